"""UA, RA, TA and MIA of one model, and its mean gap to the retrained one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from pymape.metrics.classification import Predictions, predict
from pymape.metrics.membership import membership_attack

__all__ = ["METRICS", "evaluate", "mean_gap", "summarise"]

METRICS = ("UA", "RA", "TA", "MIA")


def evaluate(
    model: nn.Module,
    *,
    forget: Sequence[dict[str, Any]],
    retain: Sequence[dict[str, Any]],
    test: Sequence[dict[str, Any]],
    batch_size: int = 128,
    collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Measure unlearning accuracy, retain accuracy, test accuracy and the membership attack, all in percent.

    Args:
        model: Hugging Face classifier or causal LM.
        forget: records the model should not know.
        retain: records it should know.
        test: records it has never seen; for class forgetting pass the remaining classes only.
        batch_size: records a forward pass.
        collate_fn: makes one batch of a list of records; default: pad on the right and stack.
        seed: seed of the attack's draw.

    Returns:
        {"UA", "RA", "TA", "MIA"}; see `summarise`.
    """
    sets = [predict(model, data, batch_size=batch_size, collate_fn=collate_fn) for data in (forget, retain, test)]
    return summarise(*sets, seed=seed)


def summarise(forget: Predictions, retain: Predictions, test: Predictions, *, seed: int = 0) -> dict[str, float]:
    """The four figures from predictions that exist already.

    UA = 100 - accuracy on the forget set; RA, TA = accuracy on the retain and test set; MIA = share of the forget set
    that an attack trained on retain-versus-test confidences calls non-member.

    Args:
        forget: predictions on the forget set.
        retain: predictions on the retain set.
        test: predictions on the test set.
        seed: seed of the attack's draw.

    Returns:
        {"UA", "RA", "TA", "MIA"}, each in [0, 100].
    """
    attack = membership_attack(retain.confidence, test.confidence, forget.confidence, seed=seed)
    return {
        "UA": 100 - forget.accuracy,
        "RA": retain.accuracy,
        "TA": test.accuracy,
        "MIA": attack.non_member_share,
    }


def mean_gap(method: Mapping[str, float], retrained: Mapping[str, float], metrics: Sequence[str] = METRICS) -> float:
    """Mean of |method - retrained| over the metrics, in percentage points; 0 is the retrained model itself.

    Args:
        method: figures of the unlearned model.
        retrained: figures of the model retrained without the forget set.
        metrics: which to average.

    Returns:
        The gap in [0, 100].

    Raises:
        ValueError: a metric that one side lacks, or no metric.
    """
    absent = [name for name in metrics if name not in method or name not in retrained]
    if absent or not metrics:
        raise ValueError(f"metrics must name figures of both models, got {list(metrics)} with {absent} absent")
    return sum(abs(method[name] - retrained[name]) for name in metrics) / len(metrics)
