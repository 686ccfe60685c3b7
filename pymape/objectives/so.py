"""Second-order unlearning."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pymape.objectives.npo import npo
from pymape.objectives.registry import objective
from pymape.objectives.sophia import Sophia
from pymape.objectives.step import Step


@objective("so", retain="optional", retain_term=True, reference=["nll"], optimizer=Sophia)
def so(step: Step, *, loss: Callable[[Step], Tensor] = npo) -> Tensor:
    """Any loss that is minimised, `npo` unless the option `loss` names another, stepped with Sophia.

    h <- b2 h + (1 - b2) H  every k steps, H the Gauss-Newton-Bartlett estimate of the diagonal curvature
    m <- b1 m + (1 - b1) g
    theta <- theta (1 - lr wd) - lr clip(m / max(rho h, eps), 1)

    The curvature is that of the NLL of the forget and retain records of the step together, under labels that the model
    draws itself, so it is never negative whatever the loss. The options of the loss and of `Sophia` (`betas`, `rho`,
    `eps`, `every`) are options of `so`.

    Source: Jia et al. 2024 (SOUL, arXiv 2404.18239); Liu et al. 2023 (Sophia, arXiv 2305.14342).
    """
    return loss(step)
