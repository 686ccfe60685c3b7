"""Sophia: a second-order optimizer with a clipped, diagonally preconditioned step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pymape.errors import check_ranges

__all__ = ["Sophia", "gauss_newton_bartlett"]


class Sophia(torch.optim.Optimizer):
    """Step along the momentum divided by a running estimate of the diagonal curvature, no entry further than lr.

    h <- b2 h + (1 - b2) H                      when `update_hessian` brings an estimate H, every `every` steps
    m <- b1 m + (1 - b1) g
    theta <- theta (1 - lr wd) - lr clip(m / max(rho h, eps), 1)

    Args:
        params: parameters or parameter groups.
        lr: learning rate, the largest change of a parameter in one step; >= 0.
        betas: decay of the momentum and of the curvature, each in [0, 1).
        rho: curvature's weight, > 0; larger is more cautious where the loss is flat.
        eps: least denominator, > 0.
        weight_decay: decoupled, as AdamW's; >= 0.
        every: steps between two estimates of the curvature, >= 1.

    Raises:
        ValueError: an option out of its range.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 3.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        rho: float = 0.04,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        every: int = 10,
    ) -> None:
        ranges = {
            "lr": (lr, lr >= 0, ">= 0"),
            "betas": (betas, _is_pair_of_decays(betas), "two numbers in [0, 1)"),
            "rho": (rho, rho > 0, "> 0"),
            "eps": (eps, eps > 0, "> 0"),
            "weight_decay": (weight_decay, weight_decay >= 0, ">= 0"),
            "every": (every, every >= 1, ">= 1"),
        }
        check_ranges(ranges)
        super().__init__(params, {name: value for name, (value, _, _) in ranges.items()})

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in the order of the groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def hessian_due(self) -> bool:
        """Whether the next step wants an estimate of the curvature first (one, however many micro-batches it has)."""
        if not self.state:
            return True
        state = next(iter(self.state.values()))
        return state["step"] % self.defaults["every"] == 0 and state["estimated_at"] != state["step"]

    @torch.no_grad()
    def update_hessian(self, estimate: Sequence[Tensor]) -> None:
        """Take in an estimate of the diagonal curvature, one tensor for each of `parameters`."""
        for group in self.param_groups:
            decay = group["betas"][1]
            for parameter, entries in zip(group["params"], estimate[: len(group["params"])], strict=True):
                state = self._state(parameter)
                state["hessian"].lerp_(entries.to(parameter), 1 - decay)
                state["estimated_at"] = state["step"]
            estimate = estimate[len(group["params"]) :]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure` recomputes the loss, as for any optimizer of torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, decay = group["lr"], group["betas"][0]
            for parameter in group["params"]:
                state = self._state(parameter)
                state["step"] += 1
                if parameter.grad is None:
                    continue
                momentum = state["momentum"].lerp_(parameter.grad, 1 - decay)
                ratio = momentum / (group["rho"] * state["hessian"]).clamp_(min=group["eps"])
                parameter.mul_(1 - lr * group["weight_decay"]).sub_(ratio.clamp_(-1, 1), alpha=lr)
        return loss

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state.update(step=0, estimated_at=-1)
            state.update(momentum=torch.zeros_like(parameter), hessian=torch.zeros_like(parameter))
        return state


def _is_pair_of_decays(betas: Any) -> bool:
    pair = isinstance(betas, Sequence) and len(betas) == 2 and all(isinstance(beta, Real) for beta in betas)
    return pair and all(0 <= beta < 1 for beta in betas)


class _Scored(Protocol):
    """What the estimate needs of a batch, as `UnlearnBatch` has it."""

    def log_probs(self) -> Tensor: ...


def gauss_newton_bartlett(
    batches: Iterable[_Scored], parameters: Sequence[Tensor], generator: torch.Generator | None = None
) -> list[Tensor]:
    """Unbiased estimate of the diagonal of the Gauss-Newton matrix of the mean NLL, by one backward pass.

    H = n g^2,  g = gradient of (1 / n) sum_i -log p_i(y_i),  y_i ~ p_i drawn from the model's own predictions

    E H = (1 / n) sum_i diag(J_i^T (diag p_i - p_i p_i^T) J_i) with J_i the Jacobian of the logits, since the scores of
    independent draws have mean zero and do not correlate.

    Args:
        batches: batches whose `log_probs()` are the [n, C] log-probabilities at their labelled tokens or records; all
            are pooled.
        parameters: what the diagonal is of.
        generator: of the drawn labels, on the device of the log-probabilities.

    Returns:
        One tensor for each parameter, >= 0; zero for a parameter that takes no part.

    Source: Liu et al. 2023 (arXiv 2305.14342), algorithm 2.
    """
    rows = torch.cat([batch.log_probs() for batch in batches])  # [n, C]
    drawn = torch.multinomial(rows.detach().exp(), 1, generator=generator)
    loss = -rows.gather(1, drawn).mean()
    gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)
    return [len(rows) * gradient.square() for gradient in gradients]
