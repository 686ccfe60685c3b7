"""How close an unlearned model is to one retrained without the forget set."""

from pymape.metrics.classification import Predictions, accuracy, confidences, entropies, predict
from pymape.metrics.evaluation import METRICS, evaluate, mean_gap, summarise
from pymape.metrics.membership import MembershipAttack, membership_attack

__all__ = [
    "METRICS",
    "MembershipAttack",
    "Predictions",
    "accuracy",
    "confidences",
    "entropies",
    "evaluate",
    "mean_gap",
    "membership_attack",
    "predict",
    "summarise",
]
