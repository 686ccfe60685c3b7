"""Training only the parameters of the selected heads and filters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from pymape.delta import DeltaPart, inside_digest, write_delta
from pymape.errors import NothingSelected
from pymape.fused import FusedParts
from pymape.masks import ModuleMasks, versions
from pymape.model_layout import COMPACT, find_layers, find_prefix, in_dim, is_projection
from pymape.ops.selected_weight_grad import selected_weight_grad

__all__ = ["PartialParameters"]

# Names of the compact parameters beside a projection's own `weight` and `bias`. With "bias" in its name a compact bias
# is exempt from weight decay by the Trainer's rule, as the full one is.


class PartialParameters:
    """Compact trainable parameters for the heads and filters that masks select; the rest of the model is frozen.

    Selected rows (W_Q, W_K, W_V, W_in, W_gate, W_up and their biases) and selected columns (W_O, W_out) become
    contiguous parameters of their own, registered on the projection they belong to, so that optimizers, clipping, DDP
    and gradient checkpointing see nothing else. The forward pass uses the full weight in one GEMM; the backward pass
    computes the full input gradient, and weight gradients of the selected rows or columns only. Compact values are
    written into the full weight by `sync`, which `attach` calls after every optimizer step; never between a forward and
    its backward. Everything below the lowest selected layer runs without autograd and stays in eval mode, so that no
    dropout acts there whatever `model.train()` says. `model.state_dict()` keeps the plain model's keys throughout, and
    `model.load_state_dict()` refreshes the compact values.

    Args:
        model: a supported Hugging Face model; it may be instrumented.
        masks: selected heads and filters, which train whatever their `requires_grad`; None trains every parameter that
            requires grad where it is (the dense baseline).
        train_task_head: with masks, also train the parameters outside `model.base_model`, whatever their
            `requires_grad`.
        fused: with masks, run RMS norms and gated feed-forward blocks (Llama and its relatives) in fused operators
            from the lowest selected layer on. They take less time and keep less for the backward pass; outputs differ
            by rounding until `merge`, and there are no second derivatives. None: on a GPU.

    Raises:
        ValueError: masks of another model, nothing to train, or projections that are not plain linear layers.

    Source: MAPE-Unlearn (arXiv 2508.17233); compact sparse fine-tuning as in S2FT (arXiv 2412.06289).
    """

    def __init__(
        self,
        model: nn.Module,
        masks: ModuleMasks | None = None,
        *,
        train_task_head: bool = False,
        fused: bool | None = None,
    ) -> None:
        self.model = model
        self.masks = masks
        self._projections: list[nn.Module] = []
        self._prefix: list[nn.Module] = []
        self._fused: FusedParts | None = None
        self._handles: list[RemovableHandle] = []
        trainable: list[nn.Parameter] = []
        selections: list[tuple[nn.Module, int, Tensor]] = []
        if any(name.endswith(tuple(COMPACT.values())) for name, _ in model.named_parameters()):
            raise ValueError("model must be plain, got one that has compact parameters already: merge() them first")
        if masks is None:
            trainable += [parameter for parameter in model.parameters() if parameter.requires_grad]
            if not trainable:
                raise NothingSelected("model must have parameters that require grad where masks are None, got none")
        else:
            selections = _selections(model, masks)
            trainable += _task_head(model) if train_task_head else []
            if not selections and not trainable:
                raise NothingSelected(
                    "masks must select at least one head or filter (or train_task_head=True), got none"
                )
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            model.requires_grad_(False)
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, dim, index in selections:
                self._select(module, dim, index)
            if self.lowest_layer is not None and fused is not False:
                self._fused = FusedParts(model, self.lowest_layer, ("cuda", "cpu") if fused else ("cuda",))
                self._fused.fuse()
            self._prefix = find_prefix(model, self.lowest_layer) if self.lowest_layer else []
            for module in self._prefix:
                module.train = MethodType(_stay_in_eval_mode, module)  # type: ignore[method-assign]
                module.eval()
            self._parts = self._replaced_parts()
            self.base_digest = inside_digest(self._parts, lambda part: part.present(model))
        except BaseException:
            self._restore()
            raise

    @property
    def lowest_layer(self) -> int | None:
        """The lowest layer with a selected module; None if there is none or all parameters train."""
        return None if self.masks is None else self.masks.lowest_layer

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters to train, by their name in the model (`...selected_weight`, `...selected_bias` if compact)."""
        return (item for item in self.model.named_parameters() if item[1].requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to train."""
        return (parameter for _, parameter in self.named_parameters())

    def numel(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call `sync` after every step of an optimizer of `parameters()`; the handle detaches it again."""
        return optimizer.register_step_post_hook(lambda *_: self.sync())

    @torch.no_grad()
    def sync(self) -> None:
        """Write the compact values into the full weights."""
        for module in self._projections:
            _scatter(module)

    def state_dict(self) -> dict[str, Tensor]:
        """The trained parameters alone, by name, without a copy."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what `state_dict` gave, for the same model and masks.

        Raises:
            ValueError: names or shapes that differ.
        """
        own = dict(self.named_parameters())
        if own.keys() != state.keys():
            different = sorted(own.keys() ^ state.keys())
            raise ValueError(f"state must name the {len(own)} trained parameters, got a difference in {different}")
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise ValueError(f"{name} must have shape {tuple(parameter.shape)}, got {tuple(state[name].shape)}")
        for name, parameter in own.items():
            parameter.copy_(state[name])
        self.sync()

    def snapshot(self) -> list[Tensor]:
        """Copies of the trained parameters, for `swapped`."""
        return [parameter.detach().clone() for parameter in self.parameters()]

    @contextmanager
    def swapped(self, values: list[Tensor]) -> Iterator[None]:
        """Run the model with other values of the trained parameters: the original model costs no second one.

        Only before a forward pass whose backward is to come, never between the two.

        Args:
            values: what `snapshot` gave.
        """
        parameters = list(self.parameters())
        current = [parameter.data for parameter in parameters]
        try:
            self._replace(parameters, values)
            yield
        finally:
            self._replace(parameters, current)

    def export_delta(self, path: str | os.PathLike[str], provenance: Mapping[str, Any] | None = None) -> None:
        """Write the trained values alone, so that `apply_delta` can update a copy of the original model.

        The file names the weights that it belongs to (their hash at the time this object was made) and those that it
        gives. It may be written before `merge` or after it.

        Args:
            path: of the safetensors file.
            provenance: JSON-able facts to keep beside the masks' own provenance.

        Raises:
            ValueError: all parameters train (masks=None), so that the change is the model.
        """
        if self.masks is None:
            raise ValueError("export_delta needs masks, got masks=None: save the merged model instead")
        self.sync()
        record = {"masks": self.masks.provenance, "cost": self.masks.cost(), "versions": versions()}
        write_delta(
            self.model,
            self._parts,
            path,
            fingerprint=self.masks.layout.fingerprint,
            base=self.base_digest,
            provenance=record | dict(provenance or {}),
        )

    def merge(self) -> nn.Module:
        """Return the plain model with the trained values, every entry outside the masks bit-identical to before.

        The model gets its own `forward` methods, parameters and `requires_grad` flags back; this object must not be
        used afterwards.
        """
        self.sync()
        self._restore()
        return self.model

    def _restore(self) -> None:
        """Take everything back that this object has put on the model, or on a part of it before an error."""
        for handle in self._handles:
            handle.remove()
        for module in self._projections:
            for name in ("forward", "selected_index", "selected_axis"):
                vars(module).pop(name, None)
            for name in COMPACT.values():
                module._parameters.pop(name, None)
        if self._fused is not None:
            self._fused.restore()
        for module in self._prefix:
            vars(module).pop("train", None)
            module.train(self.model.training)
        self._projections, self._handles, self._prefix = [], [], []
        for parameter, required in self._requires_grad:
            parameter.requires_grad_(required)

    def _replace(self, parameters: list[nn.Parameter], values: list[Tensor]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        # Autocast caches low-precision copies by parameter and would not notice the new data.
        torch.clear_autocast_cache()
        self.sync()

    def _replaced_parts(self) -> list[DeltaPart]:
        """What training may change, in terms of the plain model's parameters."""
        if self.masks is None:
            return []
        names = {module: name for name, module in self.model.named_modules()}
        parts = []
        for module in self._projections:
            projection: Any = module
            parts.append(DeltaPart(f"{names[module]}.weight", _dim(module), projection.selected_index))
            if projection.selected_bias is not None:
                parts.append(DeltaPart(f"{names[module]}.bias", 0, projection.selected_index))
        compact = tuple(COMPACT.values())
        whole = [name for name, _ in self.named_parameters() if not name.endswith(compact)]
        return parts + [DeltaPart(name, 0, None) for name in whole]

    def _select(self, module: nn.Module, dim: int, index: Tensor) -> None:
        """Give a projection compact parameters for `index` along `dim`, and a forward that trains them."""
        self._projections.append(module)
        rows = dim != in_dim(module)
        owner: Any = module
        owner.selected_axis = "rows" if rows else "columns"
        # No buffer: DDP would broadcast it before every forward, between a forward and its backward too.
        owner.selected_index = index.to(owner.weight.device)
        with torch.no_grad():
            module.register_parameter("selected_weight", nn.Parameter(_gather(module, "weight", owner.weight)))
            bias = nn.Parameter(_gather(module, "bias", owner.bias)) if rows and owner.bias is not None else None
            module.register_parameter("selected_bias", bias)
        owner.forward = MethodType(_selected_forward, module)
        self._handles += [
            module.register_state_dict_post_hook(_hide_compact),
            module.register_load_state_dict_pre_hook(_load_compact),
        ]


class _SelectedLinear(torch.autograd.Function):
    """y = x W^T + b with full input gradient and, by `selected_weight_grad`, the gradients of selected rows or columns.

    rows:    db[index] = sum over tokens of dy[:, index]
    columns: only x[:, index] is kept for backward
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        selected_weight: Tensor,
        selected_bias: Tensor | None,
        index: Tensor,
        axis: str,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        # Rows keep x itself, which Q, K and V (gate and up) share; backward makes autocast's low-precision copy again.
        kept = x if axis == "rows" else x.index_select(-1, index).to(y.dtype)
        ctx.save_for_backward(kept, weight, index)
        ctx.axis, ctx.x_dtype, ctx.dtype = axis, x.dtype, selected_weight.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, index = ctx.saved_tensors
        dx = (dy @ weight.to(dy.dtype)).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        flat_dy, flat_x = dy.flatten(0, -2), kept.flatten(0, -2).to(dy.dtype)  # [N, out], [N, in] or [N, selected]
        rows = ctx.axis == "rows"
        d_weight = selected_weight_grad(flat_x, flat_dy, index if rows else None, ctx.axis).to(ctx.dtype)
        d_bias = flat_dy.index_select(1, index).sum(0).to(ctx.dtype) if ctx.needs_input_grad[4] else None
        return dx, None, None, d_weight, d_bias, None, None


def _selected_forward(module: Any, x: Tensor) -> Tensor:
    index = module.selected_index
    if index.device != x.device:
        index = module.selected_index = index.to(x.device)
    weight = module.weight if in_dim(module) == 1 else module.weight.t()
    return _SelectedLinear.apply(
        x, weight, module.bias, module.selected_weight, module.selected_bias, index, module.selected_axis
    )


def _dim(module: Any) -> int:
    """Dimension of the weight along which a projection's rows or columns are selected."""
    inputs = in_dim(module)
    return 1 - inputs if module.selected_axis == "rows" else inputs


def _gather(module: Any, name: str, full: Tensor) -> Tensor:
    """Compact values of a full weight or bias: [selected, other], columns stored transposed."""
    index = module.selected_index.to(full.device)
    if name == "bias":
        return full.index_select(0, index)
    dim = _dim(module)
    return (full if dim == 0 else full.t()).index_select(0, index)


def _scatter(module: Any) -> None:
    """Write the compact values of a projection into its full weight and bias."""
    index = module.selected_index.to(module.weight.device)
    dim = _dim(module)
    # Contiguous, because index_copy_ takes four times as long from a transposed source on CPUs.
    values = module.selected_weight if dim == 0 else module.selected_weight.t().contiguous()
    module.weight.index_copy_(dim, index, values)
    if module.selected_bias is not None:
        module.bias.index_copy_(0, index, module.selected_bias)


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of the modules below the lowest selected layer."""
    return nn.Module.train(module, False)


def _hide_compact(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Keep the plain model's keys: the full weights hold the compact values already."""
    for compact in COMPACT.values():
        state.pop(prefix + compact, None)


def _load_compact(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Read the compact values off a plain state dict's full weights."""
    for name, compact in COMPACT.items():
        if getattr(module, compact) is not None and prefix + name in state:
            state[prefix + compact] = _gather(module, name, state[prefix + name])


def _selections(model: nn.Module, masks: ModuleMasks) -> list[tuple[nn.Module, int, Tensor]]:
    """(projection, dim of its weight, ascending indices along it) of everything that masks select."""
    masks.check_model(model)
    found: dict[nn.Module, tuple[int, list[Tensor]]] = {}
    for layer, groups, filters in zip(find_layers(model), masks.head_groups.cpu(), masks.filters.cpu(), strict=True):
        slices = layer.head_slices(groups.nonzero()[:, 0]) if groups.any() else []
        slices += layer.filter_slices(filters.nonzero()[:, 0]) if filters.any() else []
        for module, name, dim, index in slices:
            if name == "weight":  # a bias is owned by the rows that its projection's weight lists
                found.setdefault(module, (dim, []))[1].append(index)
    for module in found:
        if not is_projection(module):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise ValueError(f"model must have projections of torch.nn.Linear or transformers' Conv1D, got {kind}")
        if "forward" in vars(module):
            raise ValueError("model must have projections of its own, got one whose forward is replaced")
    return [(module, dim, torch.cat(parts).unique()) for module, (dim, parts) in found.items()]


def _task_head(model: Any) -> list[nn.Parameter]:
    body = {id(parameter) for parameter in model.base_model.parameters()}
    head = [parameter for parameter in model.parameters() if id(parameter) not in body]
    if not head:
        raise ValueError(
            f"train_task_head needs a task head with parameters of its own, got {type(model).__name__} without one"
        )
    return head
