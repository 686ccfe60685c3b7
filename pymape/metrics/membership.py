"""Membership inference: can an attacker tell that the forget set was trained on?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymape.losses import LANGUAGE_MODEL
from pymape.metrics.scores import RecordScores

__all__ = [
    "MembershipAttack",
    "lira_scores",
    "membership_attack",
    "membership_auc",
    "membership_aucs",
    "min_k_plus_plus_scores",
    "min_k_scores",
    "privleak",
    "reference_scores",
    "zlib_scores",
]

_LEAST_STD = 1e-3  # of Min-K++'s denominator


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


def membership_auc(members: Tensor, non_members: Tensor) -> float:
    """Area under the ROC curve of the attack that calls records with low scores members.

    Args:
        members: [N_f] scores of the records in question (the forget set).
        non_members: [N_t] scores of records that were never trained on.

    Returns:
        A value in [0, 1]: 1 where every member scores lower, 0.5 where the attack cannot tell, below it where the
        members look stranger than records that were never seen.

    Raises:
        ValueError: an empty or non-finite score vector.
    """
    from sklearn.metrics import roc_auc_score

    columns = [_column(name, values) for name, values in (("members", members), ("non_members", non_members))]
    stranger = np.repeat([0, 1], [len(column) for column in columns])
    return float(roc_auc_score(stranger, np.concatenate(columns).ravel()))


def zlib_scores(scores: RecordScores) -> Tensor:
    """Loss over the number of bytes to which zlib compresses the labelled text; low for members.

    Args:
        scores: with `text_bytes`.

    Returns:
        [N] fp64, in nats a byte.

    Raises:
        ValueError: scores that were found without `decode`.

    Source:
        Carlini et al. 2021, "Extracting Training Data from Large Language Models", arXiv 2012.07805.
    """
    if scores.text_bytes is None:
        raise ValueError("scores must have text_bytes (give decode to record_scores), got none")
    return scores.loss / scores.text_bytes


def min_k_scores(scores: RecordScores, k: float = 0.4) -> Tensor:
    """Mean of -log p over the share k of a record's tokens that are the least likely; low for members.

    Args:
        scores: of a token task.
        k: share in (0, 1]; at least one token is taken, and a fraction of a token none. open-unlearning's is 0.4.

    Returns:
        [N] fp64, in nats.

    Source:
        Shi et al. 2024, "Detecting Pretraining Data from Large Language Models", arXiv 2310.16789.
    """
    return _lowest_share(scores, scores.log_probs, k)


def min_k_plus_plus_scores(scores: RecordScores, k: float = 0.4) -> Tensor:
    """The same of (log p - mu) / sigma, with log p's mean and spread over the vocabulary at that token.

    Args:
        scores: of a token task.
        k: as for `min_k_scores`.

    Returns:
        [N] fp64; sigma is taken as 0.001 where it is less, as in open-unlearning.

    Source:
        Zhang et al. 2025, "Min-K%++", arXiv 2404.02936.
    """
    return _lowest_share(scores, (scores.log_probs - scores.means) / scores.stds.clamp(min=_LEAST_STD), k)


def reference_scores(scores: RecordScores, reference: RecordScores) -> Tensor:
    """Loss less that of a reference model on the same records; low for members.

    Args:
        scores: of the model.
        reference: of a model of the same kind that has not seen the records.

    Returns:
        [N] fp64, in nats.

    Raises:
        ValueError: other records.

    Source:
        Carlini et al. 2021, arXiv 2012.07805 (comparison with another model).
    """
    scores.require_same_records(reference, "reference")
    return scores.loss - reference.loss


def lira_scores(target: Tensor, shadows: Tensor) -> Tensor:
    """Offline likelihood-ratio attack: how likely a model without the record is as sure of it; low for members.

        log Pr[Z > phi],  Z ~ N(mu_n, sigma^2),  phi = log(p / (1 - p)) under the target model

    mu_n is the mean of record n over the shadow models, sigma^2 their variance around it, pooled over all records since
    few shadow models say little about one record's variance.

    Args:
        target: [N] logit-scaled confidences of the model, see `scaled_confidences`.
        shadows: [K, N] those of K >= 2 models that were not trained on these records, for instance retrained ones.

    Returns:
        [N] fp64, at most 0.

    Raises:
        ValueError: shapes that do not fit, or shadow models that agree in every record.

    Source:
        Carlini et al. 2022, "Membership Inference Attacks From First Principles", arXiv 2112.03570 (offline attack with
        a global variance; Lambda there is one minus this probability).
    """
    if shadows.ndim != 2 or len(shadows) < 2 or shadows.shape[1:] != target.shape:
        raise ValueError(
            f"shadows must have shape [K >= 2, {len(target)}], got {tuple(shadows.shape)} for {tuple(target.shape)}"
        )
    shadows = shadows.double()
    mean = shadows.mean(0)
    variance = (shadows - mean).square().sum() / ((len(shadows) - 1) * shadows.shape[1])
    if variance == 0:
        raise ValueError("shadows must differ between models, got the same confidences from all")
    return torch.special.log_ndtr((mean - target.double()) / variance.sqrt())


def membership_aucs(
    forget: RecordScores,
    holdout: RecordScores,
    *,
    reference: tuple[RecordScores, RecordScores] | None = None,
    end_token: int | None = None,
    k: float = 0.4,
) -> dict[str, float]:
    """AUC of every attack that the scores allow, by open-unlearning's names.

    Args:
        forget: scores of the forget set.
        holdout: scores of records that were never trained on.
        reference: scores of the reference model on both sets.
        end_token: end-of-text token, which Min-K and Min-K++ leave out.
        k: share of tokens in Min-K and Min-K++.

    Returns:
        "mia_loss"; of causal language models "mia_min_k" and "mia_min_k_plus_plus"; and "mia_zlib", "mia_gradnorm" and
        "mia_reference" where what they need is there. See `membership_auc`.
    """
    attacks: dict[str, Any] = {"mia_loss": lambda scores: scores.loss}
    if forget.task == LANGUAGE_MODEL:
        attacks["mia_min_k"] = lambda scores: min_k_scores(scores.without_final(end_token), k)
        attacks["mia_min_k_plus_plus"] = lambda scores: min_k_plus_plus_scores(scores.without_final(end_token), k)
    if forget.text_bytes is not None and holdout.text_bytes is not None:
        attacks["mia_zlib"] = zlib_scores
    if forget.gradient_norms is not None and holdout.gradient_norms is not None:
        attacks["mia_gradnorm"] = lambda scores: scores.gradient_norms
    found = {name: membership_auc(score(forget), score(holdout)) for name, score in attacks.items()}
    if reference is not None:
        pairs = zip((forget, holdout), reference, strict=True)
        found["mia_reference"] = membership_auc(*(reference_scores(own, other) for own, other in pairs))
    return found


def privleak(auc: float, retrained_auc: float) -> float:
    """Relative distance of an attack's 1 - AUC to that on the retrained model, in percent.

        100 ((1 - AUC) - (1 - AUC_retrained)) / (1 - AUC_retrained)

    Args:
        auc: `membership_auc` of forget against unseen records on the unlearned model, usually of Min-K.
        retrained_auc: the same on the model retrained without the forget set.

    Returns:
        0 is like retraining, negative is under-unlearned (the forget set still looks like members), positive
        over-unlearned. NaN where the attack is always right on the retrained model: nothing can be relative to that.

    Raises:
        ValueError: an AUC outside [0, 1].

    Source:
        Shi et al. 2024, "MUSE", arXiv 2407.06460, whose AUC is 1 minus ours; open-unlearning's privleak.
    """
    for name, value in (("auc", auc), ("retrained_auc", retrained_auc)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    return 100 * (retrained_auc - auc) / (1 - retrained_auc) if retrained_auc < 1 else math.nan


def _lowest_share(scores: RecordScores, values: Tensor, k: float) -> Tensor:
    """[N] minus the mean of the lowest share k of each record's values."""
    if not 0 < k <= 1:
        raise ValueError(f"k must be in (0, 1], got {k}")
    lowest = (own.sort().values[: max(1, int(k * len(own)))] for own in scores.by_record(values))
    return -torch.stack([own.mean() for own in lowest])


def _column(name: str, scores: Tensor) -> np.ndarray:
    array = scores.detach().double().cpu().numpy().reshape(-1, 1)
    if not len(array):
        raise ValueError(f"{name} must hold at least one score, got none")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(array)).sum())} non-finite scores")
    return array
