"""Membership inference: can an attacker tell that the forget set was trained on?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["MembershipAttack", "membership_attack"]


@dataclass(frozen=True)
class MembershipAttack:
    """Outcome of one attack.

    Attributes:
        non_member_share: share of the forget set that the attack calls non-member, in percent.
        members_recognised: share of the attack's own member examples it calls member, in percent.
        non_members_recognised: share of its own non-member examples it calls non-member, in percent.
    """

    non_member_share: float
    members_recognised: float
    non_members_recognised: float


def membership_attack(
    members: Tensor, non_members: Tensor, target: Tensor, *, most: int = 2000, seed: int = 0
) -> MembershipAttack:
    """Train an RBF support vector classifier (C = 3) on scores of members and non-members and apply it to the target.

    Both training classes are cut to one size by a seeded draw without replacement, so that the attack has no prior.

    Args:
        members: [N_r] scores of records that were trained on (the retain set), e.g. `confidences`.
        non_members: [N_t] scores of records that were not (the test set).
        target: [N_f] scores of the forget set.
        most: largest number of examples a class; the classifier's cost grows with its square.
        seed: seed of the draw.

    Returns:
        The attack's verdict on the target and on its own training examples.

    Raises:
        ValueError: an empty or non-finite score vector.

    Source:
        Fan et al. 2024, "SalUn", arXiv 2310.12508 (confidence attack).
    """
    from sklearn.svm import SVC

    columns = {"members": members, "non_members": non_members, "target": target}
    arrays = {name: _column(name, values) for name, values in columns.items()}
    size = min(len(arrays["members"]), len(arrays["non_members"]), most)
    rng = np.random.default_rng(seed)
    known, unknown = (rng.permutation(arrays[name])[:size] for name in ("members", "non_members"))
    attack = SVC(C=3, gamma="auto", kernel="rbf")
    attack.fit(np.concatenate([known, unknown]), np.repeat([1, 0], size))

    def share(scores: Any, verdict: int) -> float:
        return 100 * float(np.mean(attack.predict(scores) == verdict))

    return MembershipAttack(share(arrays["target"], 0), share(known, 1), share(unknown, 0))


def _column(name: str, scores: Tensor) -> np.ndarray:
    array = scores.detach().double().cpu().numpy().reshape(-1, 1)
    if not len(array):
        raise ValueError(f"{name} must hold at least one score, got none")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(array)).sum())} non-finite scores")
    return array
