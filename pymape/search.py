"""Search for the masks that carry the forget data's influence and spare the retained data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from pymape.errors import NothingSelected
from pymape.importance import Importance
from pymape.masks import ModuleMasks, versions
from pymape.model_layout import ModelLayout, layout
from pymape.ops.greedy_swap import greedy_swap

__all__ = ["MODES", "OBJECTIVES", "Mode", "Objective", "search"]

Objective = Literal["difference", "ratio", "forget", "random", "magnitude"]
Mode = Literal["greedy", "warm", "rearrange"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
MODES: tuple[str, ...] = get_args(Mode)
QUADRATIC = ("difference", "forget")  # the objectives that have a J, and so a greedy step
CONTRASTIVE = ("difference", "ratio")  # the objectives that weigh the forget set against the retain set
REPORTED = ("objective_before", "objective_after", "swaps")  # by greedy_swap
RATIO_FLOOR = 1e-6  # of the mean retain Fisher: keeps the ratio finite for modules that the retain set does not use
TRACE_FLOOR = 1e-12  # of the largest layer's


def search(
    *,
    forget: Importance,
    retain: Importance | None = None,
    budget: float = 0.1,
    objective: str = "difference",
    lam: float = 1.0,
    mode: str = "greedy",
    normalize: bool = True,
    across_layers: bool = False,
    first_order: bool = False,
    max_swaps: int = 400,
    seed: int = 0,
    model: nn.Module | ModelLayout | None = None,
    backend: str = "auto",
) -> ModuleMasks:
    """Select the modules whose removal would hurt the forget set most and the retain set least, within a budget.

    maximise J(S) = dL_forget(S) - lam dL_retain(S)  subject to  cost(S) <= budget,  dL(S) = -g.1_S + 1/2 1_S^T F 1_S

    with F the empirical Fisher of the mask gradients. Modules are coupled within a layer and kind (heads, filters): J
    is the sum over these blocks, each in shares of its forget influence, the trace of F_forget. Without `normalize` it
    is the plain sum: then the layers whose gates move the loss most take most of the budget (in a small Llama the
    first one), although training others would do more. Which modules are worth selecting at all is the same.
    `across_layers` makes one block of all modules of a kind. The warm start maximises J with the diagonal of F exactly
    (`ModuleMasks.from_scores`; a module whose score is not positive is left out, so budget may stay unused) and fixes
    how many modules each block selects; then `greedy_swap` exchanges within blocks. With grouped-query attention a
    key/value group is one module, and its gradient the sum of its query heads'.

    The other objectives: "forget" is lam = 0; "ratio" ranks modules by F_forget / F_retain; "random" fills the budget
    at random; "magnitude" takes the largest squared weights. The last three have no J and end at the warm start.

    Args:
        forget: per-sample mask gradients of the forget set.
        retain: the same of the retain set; "forget", "random" and "magnitude" work without.
        budget: share of the module-owned parameters, in (0, 1].
        objective: "difference", "ratio", "forget", "random" or "magnitude".
        lam: weight of the retain set in "difference", >= 0.
        mode: "greedy" (warm start, then the best swaps), "warm" (warm start only) or "rearrange" (warm start, then the
            one-pass rearrangement of Kwon et al. over the forget gradients, which follows their norm and not J).
        normalize: count every layer's heads, and every layer's filters, alike.
        across_layers: couple all layers, and let any two trade.
        first_order: keep the term -g.1_S, which is about 0 at a trained optimum.
        max_swaps: greedy swaps allowed per layer and kind, >= 0; `across_layers` pools them.
        seed: of objective "random".
        model: the model, or its layout; "magnitude" needs the model, the others only check that it fits.
        backend: backend of `greedy_swap`; "cuda" moves the gradients to the GPU.

    Returns:
        Masks whose provenance records the arguments, the budget used, which data they are of and, where there is a J,
        `objective_before`, `objective_after` and `swaps`: in total, and per block under `blocks`.

    Raises:
        ValueError: an argument out of range, importance that is empty, not finite or of another model, or a `lam` at
            which "difference" finds no module worth selecting.

    Source:
        arXiv 2508.17233 (MAPE); Kwon et al. 2022, arXiv 2204.09656 (diagonal warm start, rearrangement); importance
        normalised by layer: Molchanov et al. 2017, arXiv 1611.06440, and Michel et al. 2019, arXiv 1905.10650.
    """
    _check(forget, retain, objective, lam, mode, max_swaps, model)
    shape = forget.layout
    lam = float(lam) if objective == "difference" else 0.0
    found: dict[str, Any] = {"mode": "warm"}
    if objective == "random":
        masks = ModuleMasks.random(shape, budget, seed)
    elif objective == "magnitude":
        masks = ModuleMasks.magnitude(cast(nn.Module, model), budget)
    else:
        contrast = _by_group(retain) if retain is not None and objective in CONTRASTIVE else None
        blocks = [
            _block(kind, _by_group(forget), contrast, lam, first_order, normalize) for kind in ("heads", "filters")
        ]
        if objective == "ratio":
            # A ratio has no unit: weighted by the cost, it ranks the modules of both kinds on one scale.
            scores = [_ratio(block) * cost for block, cost in zip(blocks, (shape.head_cost, shape.filter_cost))]
        else:
            scores = [_own_share(block) * block.weight for block in blocks]
        masks = ModuleMasks.from_scores(scores[0], scores[1], shape, budget)
        if objective == "difference" and not (masks.heads.any() or masks.filters.any()):
            raise NothingSelected(_why_nothing(blocks, scores, budget))
        if objective in QUADRATIC:
            masks, found = _exchange(masks, blocks, mode, across_layers, max_swaps, backend)
    masks.provenance = {
        "objective": objective,
        "budget": float(budget),
        "used": masks.cost(),
        "lam": lam,
        "normalize": normalize,
        "across_layers": across_layers,
        "first_order": first_order,
        "max_swaps": max_swaps,
        "seed": seed,
        **found,
        "forget": _describe(forget),
        "retain": None if retain is None else _describe(retain),
        "versions": versions(),
    }
    return masks


class _Block(NamedTuple):
    """What J is made of for the modules of one kind."""

    forget: Tensor  # [N_f, L, U] gradients
    retain: Tensor | None  # [N_r, L, U]
    forget_fisher: Tensor  # [L, U] fp64 diagonal
    retain_fisher: Tensor | None
    linear: Tensor | None  # [L, U] fp64 first-order term, None for zero
    weight: Tensor  # [L, 1] fp64 of each layer
    lam: float


def _by_group(importance: Importance) -> Importance:
    """The importance of key/value groups in place of query heads."""
    shape = importance.layout
    if shape.group_size == 1:
        return importance
    wide = torch.promote_types(importance.heads.dtype, torch.float32)
    heads = importance.heads.unflatten(2, (shape.kv_heads, shape.group_size)).sum(-1, dtype=wide)
    return dataclasses.replace(importance, heads=heads, layout=dataclasses.replace(shape, heads=shape.kv_heads))


def _block(
    kind: str, forget: Importance, retain: Importance | None, lam: float, first_order: bool, normalize: bool
) -> _Block:
    fisher: dict[str, Tensor] = {}
    for name, importance in (("forget", forget), ("retain", retain)):
        if importance is not None:
            fisher[name] = getattr(importance, f"fisher_{kind}")
            if not fisher[name].isfinite().all():
                raise ValueError(f"{name} importance must be finite, got NaN or infinite gradients of {kind}")
    linear = getattr(forget, f"grad_{kind}") if first_order else None
    if linear is not None and retain is not None:
        linear = linear - lam * getattr(retain, f"grad_{kind}")
    gradients = None if retain is None else getattr(retain, kind)
    influence = fisher["forget"].sum(1, keepdim=True)
    # Layers without any to speak of select nothing; the floor keeps their weights finite.
    floor = TRACE_FLOOR * float(influence.max()) or 1.0
    weight = 1 / influence.clamp(min=floor) if normalize else torch.ones_like(influence)
    return _Block(getattr(forget, kind), gradients, fisher["forget"], fisher.get("retain"), linear, weight, lam)


def _own_share(block: _Block) -> Tensor:
    """What each module adds to J by itself, [L, U]."""
    fisher = block.forget_fisher
    if block.retain_fisher is not None:
        fisher = fisher - block.lam * block.retain_fisher
    return fisher / 2 if block.linear is None else fisher / 2 - block.linear


def _ratio(block: _Block) -> Tensor:
    """F_forget / F_retain of each module, [L, U]."""
    assert block.retain_fisher is not None
    floor = max(RATIO_FLOOR * float(block.retain_fisher.mean()), torch.finfo(torch.float64).tiny)
    return block.forget_fisher / block.retain_fisher.clamp(min=floor)


def _why_nothing(blocks: list[_Block], scores: list[Tensor], budget: float) -> str:
    """What keeps the difference from selecting a single module."""
    if any((score > 0).any() for score in scores):
        return f"budget must afford at least one head or filter, got {budget}"
    ratios = [block.forget_fisher / cast(Tensor, block.retain_fisher) for block in blocks if block.linear is None]
    most = max((float(ratio.nan_to_num(0.0).max()) for ratio in ratios), default=None)
    needed = "smaller" if most is None else f"below {most:.3g}"
    return f"lam must be {needed} to select at least one head or filter, got {blocks[0].lam:g}"


def _exchange(
    warm: ModuleMasks, blocks: list[_Block], mode: str, across_layers: bool, max_swaps: int, backend: str
) -> tuple[ModuleMasks, dict[str, Any]]:
    """Improve the warm masks and report J; mode "warm" only reports."""
    if mode == "warm":
        max_swaps = 0
    elif across_layers:
        max_swaps *= warm.layout.layers

    selected, reports = [], []
    for block, mask in zip(blocks, (warm.head_groups, warm.filters)):
        # Weights change no choice within a layer, so that only layers that are coupled need them in their gradients.
        searched = _coupled(block) if across_layers else block
        device = torch.device("cuda") if backend == "cuda" else block.forget.device
        retain, linear = (None if x is None else x.to(device) for x in (searched.retain, searched.linear))
        result = greedy_swap(
            searched.forget.to(device),
            retain,
            mask.view(searched.forget.shape[1:]).to(device),
            lam=block.lam,
            linear=linear,
            max_swaps=max_swaps,
            mode="rearrange" if mode == "rearrange" else "swap",
            backend=backend,
        )
        selected.append(result.mask.cpu().view_as(mask))
        weight = 1.0 if across_layers else block.weight[:, 0].cpu()
        values = {name: (getattr(result, name).cpu() * weight).tolist() for name in REPORTED if name != "swaps"}
        reports.append({**values, "swaps": result.swaps.tolist()})
    found: dict[str, Any] = {"mode": mode, "blocks": dict(zip(("heads", "filters"), reports))}
    for name in REPORTED:
        found[name] = sum(sum(report[name]) for report in reports)
    heads = selected[0].repeat_interleave(warm.layout.group_size, dim=1)
    return ModuleMasks(heads, selected[1], warm.layout), found


def _coupled(block: _Block) -> _Block:
    """The block with all layers as one, [..., 1, L * U], and their weights in the gradients."""
    root = block.weight.sqrt().float()
    forget = (block.forget * root).flatten(-2).unsqueeze(-2)
    retain = None if block.retain is None else (block.retain * root).flatten(-2).unsqueeze(-2)
    linear = None if block.linear is None else (block.linear * block.weight).flatten().unsqueeze(0)
    return block._replace(forget=forget, retain=retain, linear=linear)


def _describe(importance: Importance) -> dict[str, Any]:
    return {"records": len(importance), "fingerprint": importance.fingerprint, **importance.provenance}


def _check(
    forget: Importance,
    retain: Importance | None,
    objective: str,
    lam: float,
    mode: str,
    max_swaps: int,
    model: nn.Module | ModelLayout | None,
) -> None:
    for name, value, valid in (("objective", objective, OBJECTIVES), ("mode", mode, MODES)):
        if value not in valid:
            raise ValueError(f"{name} must be one of {', '.join(valid)}, got {value!r}")
    if mode == "rearrange" and objective not in QUADRATIC:
        raise ValueError(f"mode 'rearrange' needs objective 'difference' or 'forget', got {objective!r}")
    if not (lam >= 0 and math.isfinite(lam)):
        raise ValueError(f"lam must be finite and >= 0, got {lam}")
    if max_swaps < 0:
        raise ValueError(f"max_swaps must be >= 0, got {max_swaps}")
    if retain is None and objective in CONTRASTIVE:
        raise ValueError(f"retain must be an Importance for objective {objective!r}, got None")
    if objective == "magnitude" and not isinstance(model, nn.Module):
        raise ValueError(f"model must be the model itself for objective 'magnitude', got {type(model).__name__}")
    for name, importance in (("forget", forget), ("retain", retain)):
        if importance is not None and len(importance) == 0:
            raise ValueError(f"{name} importance must hold at least one record, got none")
    others = {
        "retain": None if retain is None else retain.layout,
        "model": layout(model) if isinstance(model, nn.Module) else model,
    }
    for name, other in others.items():
        if other is not None and other.fingerprint != forget.layout.fingerprint:
            raise ValueError(
                f"{name} must be of the same model as forget, {forget.layout.model_type} "
                f"{forget.layout.fingerprint[:12]}, got {other.model_type} {other.fingerprint[:12]}"
            )
