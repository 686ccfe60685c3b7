"""Masks over attention heads and feed-forward filters: make, save, load, describe, plot."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pymape.model_layout import ModelLayout, find_layers
from pymape.model_layout import layout as layout_of
from pymape.storage.files import atomic_write
from pymape.version import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ModuleMasks", "versions"]

FORMAT = "pymape.masks.1"
COLUMNS = 512  # a wider mask is pooled, so that single filters stay visible in the picture
COLOR = "#1c4e80"


def versions() -> dict[str, str]:
    """Versions of pymape and torch, for provenance records."""
    return {"pymape": __version__, "torch": torch.__version__}


def _affordable(budget: float, layout: ModelLayout) -> int:
    """The most parameters whose share of all does not exceed the budget."""
    if not 0 < budget <= 1:
        raise ValueError(f"budget must lie in (0, 1], got {budget}")
    nearest = round(budget * layout.total_cost)
    return nearest if nearest / layout.total_cost <= budget else nearest - 1


def _ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the positive scores, best first (ties: lowest index), and the running sum of their scores."""
    flat = scores.detach().double().flatten().cpu()
    if not flat.isfinite().all():
        raise ValueError(f"scores must be finite, got {int((~flat.isfinite()).sum())} NaN or infinite values")
    order = flat.argsort(descending=True, stable=True)[: int((flat > 0).sum())]
    gains = torch.cat([flat.new_zeros(1), flat[order].cumsum(0)])
    return order, gains


def _squares(slices: list[tuple[nn.Module, str, int, Tensor]]) -> list[Tensor]:
    """Sum of squares of every selected row or column of some parameters, in fp64."""
    sums = []
    for module, name, dim, index in slices:
        rows = getattr(module, name).detach().index_select(dim, index.to(getattr(module, name).device)).movedim(dim, 0)
        sums.append(rows.double().square().reshape(len(index), -1).sum(1).cpu())
    return sums


@dataclass(eq=False)
class ModuleMasks:
    """Which attention heads and which feed-forward filters of a model are influence-critical (True).

    With grouped-query attention all query heads of a key/value group are selected together: they share parameters.

    Args:
        heads: bool [layers, heads].
        filters: bool [layers, filters].
        layout: the model's layout, with its fingerprint.
        provenance: JSON-able record of how the masks came to be.

    Raises:
        ValueError: shapes that differ from the layout, or a key/value group that is selected in part.
    """

    heads: Tensor
    filters: Tensor
    layout: ModelLayout
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("heads", "filters"):
            mask, expected = getattr(self, name), (self.layout.layers, getattr(self.layout, name))
            if tuple(mask.shape) != expected:
                raise ValueError(f"{name} must have shape {expected}, got {tuple(mask.shape)}")
            if mask.dtype != torch.bool:
                raise ValueError(f"{name} must be bool, got {mask.dtype}")
        groups = self.heads.unflatten(1, (self.layout.kv_heads, self.layout.group_size))
        if not torch.equal(groups.any(-1), groups.all(-1)):
            raise ValueError(f"heads must select whole key/value groups of {self.layout.group_size} query heads")

    @property
    def head_groups(self) -> Tensor:
        """The selected key/value groups, bool [layers, kv_heads]: `heads` itself where a group has one query head."""
        return self.heads[:, :: self.layout.group_size]

    @property
    def lowest_layer(self) -> int | None:
        """The lowest layer with a selected module, 0 being the first; None where nothing is selected."""
        selected = self.heads.any(1) | self.filters.any(1)
        return int(selected.nonzero()[0]) if selected.any() else None

    def cost(self) -> float:
        """Share of the module-owned parameters that the masks select, in [0, 1]."""
        spent = int(self.head_groups.sum()) * self.layout.head_cost + int(self.filters.sum()) * self.layout.filter_cost
        return spent / self.layout.total_cost

    @classmethod
    def everything(cls, layout: ModelLayout) -> ModuleMasks:
        """Masks that select every module: the module-oblivious baseline."""
        heads = torch.ones(layout.layers, layout.heads, dtype=torch.bool)
        filters = torch.ones(layout.layers, layout.filters, dtype=torch.bool)
        return cls(heads, filters, layout, {"objective": "everything", "budget": 1.0})

    @classmethod
    def from_scores(cls, head_scores: Tensor, filter_scores: Tensor, layout: ModelLayout, budget: float) -> ModuleMasks:
        """Select the modules with the largest sum of scores that the budget affords.

        maximise sum_{i in S} score_i  subject to  cost(S) <= budget. All key/value groups have one cost and all
        filters another, so the best S with n groups is the n best groups and as many of the best filters as still fit;
        scanning n is exact in O(M log M). A module whose score is not positive is never selected, so budget may stay
        unused. Ties go to the lowest index, then to the fewest groups.

        Args:
            head_scores: [layers, kv_heads], finite; one score per key/value group.
            filter_scores: [layers, filters], finite.
            layout: the model's layout, which gives the costs.
            budget: share of the module-owned parameters, in (0, 1].

        Raises:
            ValueError: scores of another shape or not finite, or a budget outside (0, 1].
        """
        for name, scores, width in (
            ("head_scores", head_scores, layout.kv_heads),
            ("filter_scores", filter_scores, layout.filters),
        ):
            if tuple(scores.shape) != (layout.layers, width):
                raise ValueError(f"{name} must have shape ({layout.layers}, {width}), got {tuple(scores.shape)}")
        limit = _affordable(budget, layout)
        (head_order, head_gains), (filter_order, filter_gains) = _ranked(head_scores), _ranked(filter_scores)
        head_counts = torch.arange(min(len(head_order), limit // layout.head_cost) + 1)
        filter_counts = ((limit - head_counts * layout.head_cost) // layout.filter_cost).clamp(max=len(filter_order))
        best = int((head_gains[head_counts] + filter_gains[filter_counts]).argmax())

        groups = torch.zeros(layout.layers * layout.kv_heads, dtype=torch.bool)
        filters = torch.zeros(layout.layers * layout.filters, dtype=torch.bool)
        groups[head_order[:best]] = True
        filters[filter_order[: int(filter_counts[best])]] = True
        heads = groups.view(layout.layers, layout.kv_heads).repeat_interleave(layout.group_size, dim=1)
        return cls(heads, filters.view(layout.layers, layout.filters), layout, {"budget": float(budget)})

    @classmethod
    def random(cls, layout: ModelLayout, budget: float, seed: int = 0) -> ModuleMasks:
        """Random modules that fill the budget; every head and filter is as likely as any other."""
        generator = torch.Generator().manual_seed(seed)
        heads = torch.rand(layout.layers, layout.kv_heads, dtype=torch.float64, generator=generator)
        filters = torch.rand(layout.layers, layout.filters, dtype=torch.float64, generator=generator)
        # Weighted by its cost, a module's score per parameter is its draw, whatever its kind.
        masks = cls.from_scores(heads * layout.head_cost, filters * layout.filter_cost, layout, budget)
        masks.provenance.update(objective="random", seed=seed)
        return masks

    @classmethod
    def magnitude(cls, model: nn.Module, budget: float) -> ModuleMasks:
        """The modules that hold the largest share of the squared weights that the budget affords."""
        layout = layout_of(model)
        heads = torch.zeros(layout.layers, layout.kv_heads, dtype=torch.float64)
        filters = torch.zeros(layout.layers, layout.filters, dtype=torch.float64)
        for index, layer in enumerate(find_layers(model)):
            for group in range(layout.kv_heads):
                owned = layer.head_slices(torch.tensor([group]))
                heads[index, group] = torch.stack([squares.sum() for squares in _squares(owned)]).sum()
            filters[index] = torch.stack(_squares(layer.filter_slices(torch.arange(layout.filters)))).sum(0)
        masks = cls.from_scores(heads, filters, layout, budget)
        masks.provenance.update(objective="magnitude")
        return masks

    def check_model(self, model: nn.Module | ModelLayout) -> None:
        """Raise ValueError unless the masks were made for this model (or for one with the same parameter shapes)."""
        other = model if isinstance(model, ModelLayout) else layout_of(model)
        if other.fingerprint != self.layout.fingerprint:
            raise ValueError(
                f"masks must fit the model, got masks of {self.layout.model_type} {self.layout.fingerprint[:12]} "
                f"for {other.model_type} {other.fingerprint[:12]}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks, their layout and provenance as one safetensors file, in one step."""
        from safetensors.torch import save_file

        metadata = {
            "format": FORMAT,
            "layout": json.dumps(dataclasses.asdict(self.layout)),
            "provenance": json.dumps(self.provenance),
        }
        tensors = {"heads": self.heads.cpu().contiguous(), "filters": self.filters.cpu().contiguous()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | ModelLayout | None = None) -> ModuleMasks:
        """Read masks that `save` wrote, and check that they fit `model` if one is given.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is truncated, corrupt or no mask file, or masks of another model.
        """
        from safetensors import SafetensorError, safe_open

        if Path(path).is_dir():
            raise ValueError(f"masks must be a file, got the folder {str(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"format is {metadata.get('format')!r}, not {FORMAT!r}")
                layout = ModelLayout(**json.loads(metadata["layout"]))
                provenance = json.loads(metadata["provenance"])
                masks = cls(file.get_tensor("heads"), file.get_tensor("filters"), layout, provenance)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path must be an intact mask file, got {os.fspath(path)}: {error}") from error
        if model is not None:
            masks.check_model(model)
        return masks

    def summary(self) -> str:
        """A table of the selected heads and filters per layer, below how they were found."""
        layout, made = self.layout, self.provenance
        heads, filters = self.heads.sum(1).tolist(), self.filters.sum(1).tolist()
        budget = f" (budget {made['budget']:.2%})" if "budget" in made else ""
        lines = [
            f"masks of {layout.model_type} {layout.fingerprint[:12]}, {made.get('objective', 'unknown objective')}",
            f"{sum(heads)} of {layout.layers * layout.heads} heads, {sum(filters)} of {layout.layers * layout.filters} "
            f"filters: {self.cost():.2%} of the module parameters{budget}",
        ]
        if "objective_before" in made:
            lines.append(
                f"J {made['objective_before']:.6g} -> {made['objective_after']:.6g}, "
                f"mode {made['mode']}, lam {made['lam']:g}, {made['swaps']} swaps"
            )
        lines.append(f"{'layer':>5}  {'heads':>9}  {'filters':>13}")
        for layer, (h, f) in enumerate(zip(heads, filters, strict=True)):
            lines.append(f"{layer:>5}  {h:>3} / {layout.heads:<3}  {f:>5} / {layout.filters:<5}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the masks as a layers x modules picture with the share selected per layer.

        Wide masks are pooled: a column of the picture then shows the share selected among neighbouring modules.

        Args:
            path: where to write the picture, its format by the ending (png, svg, pdf); None only returns it.

        Returns:
            The matplotlib figure.
        """
        from matplotlib.figure import Figure

        layout = self.layout
        figure = Figure(figsize=(11, 1.5 + 0.22 * max(layout.layers, 6)), dpi=150, layout="constrained")
        head_width = min(max(layout.heads / 16, 0.5), 2)
        axes = figure.subplots(1, 4, sharey=True, width_ratios=[head_width, 0.45, 4, 0.45])
        for (picture, bars), mask, name in zip(
            (axes[:2], axes[2:]), (self.heads, self.filters), ("head", "filter"), strict=True
        ):
            _draw_mask(picture, mask, name)
            share = mask.double().mean(1).tolist()
            bars.barh(range(layout.layers), [100 * value for value in share], color=COLOR, height=0.75)
            bars.set(xlabel=f"% of {name}s", xlim=(0, max(1.0, 110 * max(share))))
            bars.spines[["top", "right"]].set_visible(False)
            bars.tick_params(axis="y", length=0)
        axes[2].tick_params(axis="y", length=0)
        step = 1 + (layout.layers - 1) // 24
        axes[0].set(ylabel="layer", yticks=range(0, layout.layers, step), ylim=(layout.layers - 0.5, -0.5))
        figure.suptitle(
            f"{layout.model_type}: {int(self.heads.sum())} of {self.heads.numel()} heads, {int(self.filters.sum())} of "
            f"{self.filters.numel()} filters ({self.cost():.1%} of the module parameters)",
            fontsize="medium",
        )
        if path is not None:
            with atomic_write(path) as temporary:
                figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png")
        return figure


def _draw_mask(axes: Axes, mask: Tensor, name: str) -> None:
    """Draw one kind of modules, at most COLUMNS columns wide."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    layers, width = mask.shape
    pool = -(-width // COLUMNS)
    image = torch.nn.functional.pad(mask.double(), (0, -width % pool), value=torch.nan)
    image = image.unflatten(1, (-1, pool)).nanmean(-1)  # [layers, columns]
    tint = LinearSegmentedColormap.from_list("mask", ["#f1f3f5", COLOR])
    # The edges of the picture are module numbers; the last column may reach beyond the last module.
    extent = (-0.5, image.shape[1] * pool - 0.5, layers - 0.5, -0.5)
    axes.imshow(
        image.numpy(),
        cmap=tint,
        vmin=0,
        vmax=max(float(image.max()), 1e-12),
        aspect="auto",
        extent=extent,
        interpolation="nearest",
    )
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_xlabel(name if pool == 1 else f"{name} ({pool} per column, darker = more selected)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.hlines([row + 0.5 for row in range(layers - 1)], -0.5, width - 0.5, color="white", linewidth=1)
    if width <= 64:
        axes.vlines([column + 0.5 for column in range(width - 1)], -0.5, layers - 0.5, color="white", linewidth=1)
