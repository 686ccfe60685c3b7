"""How close an unlearned model is to one retrained without the forget set."""

from .classification import Predictions, accuracy, confidences, entropies, predict
from .evaluation import METRICS, evaluate, mean_gap, summarise
from .membership import MembershipAttack, membership_attack

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
