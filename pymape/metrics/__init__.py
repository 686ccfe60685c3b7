"""Whether a model has forgotten, what it still can do, and how close it is to one retrained without the forget set."""

from pymape.metrics.classification import (
    Predictions,
    accuracy,
    confidences,
    entropies,
    modified_entropies,
    predict,
    scaled_confidences,
)
from pymape.metrics.costs import Cost, measure_cost
from pymape.metrics.distances import ModelDistance, linear_cka, model_distance
from pymape.metrics.evaluation import METRICS, evaluate, mean_gap, score_metrics, summarise
from pymape.metrics.generation import answer_records, generate_answers
from pymape.metrics.language import (
    exact_memorization,
    extraction_strength,
    forget_quality,
    forget_truth_ratio,
    model_utility,
    option_probabilities,
    rouge_l_recall,
    true_better,
    truth_ratios,
)
from pymape.metrics.membership import (
    MembershipAttack,
    lira_scores,
    membership_attack,
    membership_auc,
    membership_aucs,
    min_k_plus_plus_scores,
    min_k_scores,
    privleak,
    reference_scores,
    zlib_scores,
)
from pymape.metrics.relearning import RelearningCurve, relearning_attack
from pymape.metrics.scores import RecordScores, gradient_norms, record_scores
from pymape.metrics.tofu import AnswerScores, QuestionSet, score_answers, tofu_metrics

__all__ = [
    "METRICS",
    "AnswerScores",
    "Cost",
    "MembershipAttack",
    "ModelDistance",
    "Predictions",
    "QuestionSet",
    "RecordScores",
    "RelearningCurve",
    "accuracy",
    "answer_records",
    "confidences",
    "entropies",
    "evaluate",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "forget_truth_ratio",
    "generate_answers",
    "gradient_norms",
    "linear_cka",
    "lira_scores",
    "mean_gap",
    "measure_cost",
    "membership_attack",
    "membership_auc",
    "membership_aucs",
    "min_k_plus_plus_scores",
    "min_k_scores",
    "model_distance",
    "model_utility",
    "modified_entropies",
    "option_probabilities",
    "predict",
    "privleak",
    "record_scores",
    "reference_scores",
    "relearning_attack",
    "rouge_l_recall",
    "scaled_confidences",
    "score_answers",
    "score_metrics",
    "summarise",
    "tofu_metrics",
    "true_better",
    "truth_ratios",
    "zlib_scores",
]
