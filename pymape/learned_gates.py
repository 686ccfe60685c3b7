"""True losses under masks: many candidates in one forward, and masks learned by gradient descent on their gates."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pymape.data.positions import with_positions
from pymape.errors import NothingSelected
from pymape.forward import LABELS
from pymape.importance import prepared
from pymape.losses import base_model, per_sample_loss
from pymape.masks import ModuleMasks, versions
from pymape.model_layout import layout
from pymape.modules import gates

__all__ = ["METHODS", "evaluate_candidates", "learn_gates"]

METHODS = ("hard_concrete", "straight_through")
LOW, HIGH = -0.1, 1.1  # the concrete distribution is stretched to this range, then clamped to [0, 1]
TEMPERATURE = 2 / 3

Loss = Callable[[Any, Mapping[str, Tensor]], Tensor]


def evaluate_candidates(
    model: nn.Module,
    masks: Sequence[ModuleMasks],
    batch: Mapping[str, Any],
    loss: Loss | None = None,
    *,
    per_sample: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Losses of a batch with the modules of each of K masks switched off (gate = 1 - mask).

    The batch is repeated once per mask and every sample has gates of its own, so one forward serves all masks.

    Args:
        model: Hugging Face model of a supported architecture; it runs in eval mode and is left as it was found.
        masks: K masks of this model.
        batch: B samples with labels.
        loss: (model outputs, batch) -> [B] losses, in place of `per_sample_loss`.
        per_sample: return the loss of every sample in place of their mean.
        chunk_size: masks per forward, to bound the memory; None takes all at once.
        backend: of the masked operators, where the model is not instrumented yet.

    Returns:
        [K] mean losses, or [K, B] with `per_sample`, on the model's device.

    Raises:
        ValueError: no masks, masks of another model, or a chunk size below 1.
    """
    if not masks:
        raise ValueError("masks must hold at least one candidate, got none")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    shape = layout(model)
    for mask in masks:
        mask.check_model(shape)
    losses = []
    with torch.no_grad(), prepared(model, backend, None):
        run = _Forward(model, loss)
        for start in range(0, len(masks), chunk_size or len(masks)):
            chunk = masks[start : start + (chunk_size or len(masks))]
            selected = [torch.stack([getattr(mask, kind) for mask in chunk]) for kind in ("heads", "filters")]
            size = _batch_size(batch)
            repeated = {
                name: value.repeat(len(chunk), *[1] * (value.dim() - 1)) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }  # [K * B, ...], mask by mask
            heads, filters = (1 - run.place(x).repeat_interleave(size, dim=0) for x in selected)  # [K * B, L, M]
            losses.append(run(repeated, heads, filters).view(len(chunk), size))
    result = torch.cat(losses)
    return result if per_sample else result.mean(1)


def learn_gates(
    model: nn.Module,
    forget: Iterable[Mapping[str, Any]],
    retain: Iterable[Mapping[str, Any]],
    budget: float = 0.1,
    *,
    method: str = "hard_concrete",
    lam: float = 1.0,
    steps: int = 200,
    lr: float = 0.1,
    penalty: float = 1.0,
    loss: Loss | None = None,
    seed: int = 0,
    backend: str = "auto",
    progress: bool | None = None,
) -> ModuleMasks:
    """Learn which modules to select from true losses, by gradient descent on random gates.

    maximise E[L_forget(1 - z) - lam L_retain(1 - z)]  subject to  E[cost(z)] <= budget

    z is the random mask, drawn anew for every sample, and 1 - z its gates. The constraint is an augmented Lagrangian on
    the relative excess x = E[cost] / budget - 1: each step adds max(0, mu + penalty * x)^2 / (2 * penalty) to the loss,
    and mu becomes max(0, mu + penalty * x). Both methods have one logit per module (per key/value group).
    "hard_concrete": z is a stretched and clamped concrete variable. "straight_through": z is a Bernoulli variable that
    passes its gradient on to its probability. At the end the masks take the largest gates that the budget affords, as
    `ModuleMasks.from_scores` does with gates times costs.

    Args:
        model: Hugging Face model of a supported architecture; it runs in eval mode and is left as it was found.
        forget: batches of the forget set with labels, gone through as often as needed.
        retain: the same of the retain set.
        budget: share of the module-owned parameters, in (0, 1].
        method: "hard_concrete" or "straight_through".
        lam: weight of the retain loss, >= 0.
        steps: optimizer (Adam) steps, one forget and one retain batch each.
        lr: learning rate of the logits.
        penalty: strength of the cost penalty, > 0.
        loss: (model outputs, batch) -> [B] losses, in place of `per_sample_loss`.
        seed: of the gates.
        backend: of the masked operators, where the model is not instrumented yet.
        progress: show a progress bar; default only on a terminal.

    Returns:
        Binary masks within the budget.

    Raises:
        ValueError: an argument out of range, no batches, a loss that is NaN or infinite, or no module left.

    Source:
        Louizos et al. 2018, arXiv 1712.01312 (hard concrete gates); Bengio et al. 2013, arXiv 1308.3432
        (straight-through).
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < budget <= 1:
        raise ValueError(f"budget must lie in (0, 1], got {budget}")
    if not (lam >= 0 and math.isfinite(lam)):
        raise ValueError(f"lam must be finite and >= 0, got {lam}")
    for name, value in (("steps", steps), ("lr", lr), ("penalty", penalty)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and > 0, got {value}")
    shape = layout(model)
    batches = zip(_endless("forget", forget), _endless("retain", retain))
    with torch.enable_grad(), prepared(model, backend, None):
        run = _Forward(model, loss)
        # Every module starts out selected with probability `budget`: the constraint holds, and nothing is decided.
        start = math.log(budget / (1 - budget)) if budget < 1 else 4.0
        start += TEMPERATURE * math.log(-LOW / HIGH) if method == "hard_concrete" else 0.0
        sizes = (shape.kv_heads, shape.filters)
        logits = [torch.full((shape.layers, size), start, device=run.device, requires_grad=True) for size in sizes]
        shares = [cost / shape.total_cost for cost in (shape.head_cost, shape.filter_cost)]
        optimizer = torch.optim.Adam(logits, lr=lr)
        generator = torch.Generator().manual_seed(seed)
        multiplier = 0.0
        bar = tqdm(total=steps, desc="gates", unit="step", disable=None if progress is None else not progress)
        with bar:
            for step, pair in enumerate(itertools.islice(batches, steps)):
                losses = []
                for batch in pair:
                    drawn = [_draw(x, method, _batch_size(batch), generator) for x in logits]
                    heads = (1 - drawn[0]).repeat_interleave(shape.group_size, dim=2)
                    losses.append(run(batch, heads, 1 - drawn[1]).mean())
                cost = torch.stack([_probability(x, method).sum() * c for x, c in zip(logits, shares)]).sum()
                excess = cost / budget - 1
                reached = (multiplier + penalty * excess).clamp(min=0)
                total = lam * losses[1] - losses[0] + reached.square() / (2 * penalty)
                if not total.isfinite():
                    raise ValueError(f"loss must be finite, got {total.item()} at step {step}")
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                multiplier = reached.item()
                bar.update()
    scores = [_expected(x.detach(), method) * cost for x, cost in zip(logits, (shape.head_cost, shape.filter_cost))]
    masks = ModuleMasks.from_scores(scores[0], scores[1], shape, budget)
    if not (masks.heads.any() or masks.filters.any()):
        raise NothingSelected(
            f"learn_gates must leave at least one head or filter, got none after {steps} steps at lr={lr} "
            f"with lam={lam}: try more steps, a larger lr or a smaller lam"
        )
    masks.provenance = {
        "objective": f"learned ({method})",
        "budget": float(budget),
        "used": masks.cost(),
        "expected_cost": cost.item(),
        "lam": float(lam),
        "steps": steps,
        "lr": lr,
        "penalty": penalty,
        "seed": seed,
        "versions": versions(),
    }
    return masks


def _probability(logits: Tensor, method: str) -> Tensor:
    """P(z > 0), which is what the cost counts."""
    return torch.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH) if method == "hard_concrete" else logits)


def _expected(logits: Tensor, method: str) -> Tensor:
    """The gate without noise, in [0, 1]."""
    gate = torch.sigmoid(logits)
    return (gate * (HIGH - LOW) + LOW).clamp(0, 1) if method == "hard_concrete" else gate


def _draw(logits: Tensor, method: str, samples: int, generator: torch.Generator) -> Tensor:
    """Random masks with a gradient to the logits, [samples, L, U]."""
    uniform = torch.rand(samples, *logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(logits.device)
    if method == "straight_through":
        probability = torch.sigmoid(logits)
        return (uniform < probability).to(logits.dtype) + probability - probability.detach()
    gate = torch.sigmoid((uniform.logit() + logits) / TEMPERATURE)
    return (gate * (HIGH - LOW) + LOW).clamp(0, 1)


class _Forward:
    """A gated forward of a batch, down to the losses of its samples."""

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        self.model, self.loss = model, loss
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
        accepted = set(inspect.signature(base_model(model).forward).parameters)
        self.options = {"use_cache": False} if "use_cache" in accepted else {}
        # Without labels the model does not compute a batch loss that nobody reads.
        self.accepted = accepted.difference(LABELS)

    def place(self, gate: Tensor) -> Tensor:
        return gate.to(self.device, self.dtype)

    def __call__(self, batch: Mapping[str, Any], heads: Tensor, filters: Tensor) -> Tensor:
        batch = with_positions(self.model, batch)
        inputs = {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        with gates(self.model, self.place(heads), self.place(filters)):
            outputs = self.model(**{name: inputs[name] for name in inputs if name in self.accepted}, **self.options)
        return per_sample_loss(self.model, inputs, outputs) if self.loss is None else self.loss(outputs, inputs)


def _batch_size(batch: Mapping[str, Any]) -> int:
    sizes = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    if len(sizes) != 1:
        raise ValueError(f"batch must hold tensors of one batch size, got sizes {sorted(sizes)}")
    return sizes.pop()


def _endless(name: str, batches: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"{name} must give at least one batch each time it is gone through, got none")
