"""What a language model still knows and can still do: TOFU's metrics, verbatim extraction and ROUGE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pymape.metrics.scores import RecordScores

__all__ = [
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "forget_truth_ratio",
    "model_utility",
    "option_probabilities",
    "rouge_l_recall",
    "rouge_scorer",
    "true_better",
    "truth_ratios",
]


def truth_ratios(correct: Tensor, wrong: Tensor) -> Tensor:
    """Geometric-mean probability of the perturbed answers over the probability of the paraphrased one.

        exp(-mean_k loss_k) / exp(-loss), with a loss the mean -log p over an answer's tokens

    Args:
        correct: [N] losses of the paraphrased answers; of the answers themselves where a set has no paraphrases.
        wrong: [N, K] losses of the perturbed answers.

    Returns:
        [N] fp64; below 1 the model prefers the truth.

    Raises:
        ValueError: shapes that do not fit, or no answer.

    Source:
        Maini et al. 2024, "TOFU", arXiv 2401.06121, section 2.2, with the geometric mean of its code and of
        open-unlearning (which adds 1e-10 to the denominator).
    """
    _check_answers(correct, wrong)
    return (correct.double() - wrong.double().mean(1)).exp()


def forget_truth_ratio(ratios: Tensor) -> float:
    """Mean of min(R, 1 / R): 1 where truth and falsehood are equally likely (open-unlearning's closer_to_1_better).

    Args:
        ratios: [N] `truth_ratios` on the forget set.

    Returns:
        A value in [0, 1].
    """
    _check_some("ratios", ratios)
    return torch.minimum(ratios.double(), 1 / ratios.double()).mean().item()


def true_better(ratios: Tensor) -> float:
    """Mean of max(0, 1 - R): 1 where falsehoods are impossible; what model utility takes of the other sets.

    Args:
        ratios: [N] `truth_ratios`.

    Returns:
        A value in [0, 1].
    """
    _check_some("ratios", ratios)
    return (1 - ratios.double()).clamp(min=0).mean().item()


def forget_quality(unlearned: Tensor, retrained: Tensor) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between two models' truth ratios on the forget set.

    Args:
        unlearned: [N] `truth_ratios` of the unlearned model.
        retrained: [M] those of the model trained on the retain set only.

    Returns:
        A value in [0, 1]; high where the test cannot tell the models apart.

    Raises:
        ValueError: an empty sample.

    Source:
        Maini et al. 2024, arXiv 2401.06121, section 2.2.
    """
    from scipy.stats import ks_2samp

    _check_some("unlearned", unlearned)
    _check_some("retrained", retrained)
    return float(ks_2samp(unlearned.double().numpy(), retrained.double().numpy()).pvalue)


def option_probabilities(correct: Tensor, wrong: Tensor) -> Tensor:
    """Probability of the right answer among the given ones, p / (p + sum_k p_k).

    Args:
        correct: [N] losses of the right answers.
        wrong: [N, K] losses of the perturbed ones.

    Returns:
        [N] fp64 in [0, 1].

    Raises:
        ValueError: shapes that do not fit, or no answer.

    Source:
        Maini et al. 2024, arXiv 2401.06121, section 2.2 (real authors and world facts).
    """
    _check_answers(correct, wrong)
    return (-torch.cat([correct[:, None], wrong], 1).double()).softmax(1)[:, 0]


def model_utility(values: Mapping[str, float]) -> float:
    """Harmonic mean of figures in [0, 1]; 0 as soon as one of them is.

    Args:
        values: TOFU's nine: probability, ROUGE-L recall and `true_better` on the retain set, the real authors and the
            world facts; or fewer where a model has never seen some of the sets.

    Returns:
        A value in [0, 1].

    Raises:
        ValueError: no value, or one outside [0, 1].

    Source:
        Maini et al. 2024, arXiv 2401.06121, section 2.2.
    """
    from scipy.stats import hmean

    wrong = [name for name, value in values.items() if not 0 <= value <= 1]
    if not values or wrong:
        raise ValueError(f"values must be figures in [0, 1], got {len(values)} with {wrong} outside")
    return float(hmean(list(values.values())))


def extraction_strength(scores: RecordScores) -> Tensor:
    """Share of an answer that the model completes by itself: 1 - min{k : f(x, y_<k) = y_>=k} / |y|, f greedy decoding.

    Every token is predicted from the true ones before it, which greedy decoding gives too as long as it has been right;
    so the suffix is the longest one whose tokens are all predicted right. An answer whose last token is wrong has 0;
    open-unlearning gives it 1 / |y|, and leaves the end-of-text token out (`RecordScores.without_final`).

    Args:
        scores: of a causal language model.

    Returns:
        [N] fp64 in [0, 1].

    Source:
        Carlini et al. 2021, arXiv 2012.07805; Wang et al. 2025, "Towards Effective Evaluations and Comparisons for LLM
        Unlearning Methods", arXiv 2406.09179.
    """
    hits = scores.by_record(scores.predicted == scores.labels)
    return torch.stack([own.flip(0).long().cumprod(0).double().mean() for own in hits])


def exact_memorization(scores: RecordScores) -> Tensor:
    """Share of an answer's tokens that are the likeliest ones given the true tokens before them.

    Args:
        scores: of a causal language model.

    Returns:
        [N] fp64 in [0, 1].

    Source:
        Tirumala et al. 2022, "Memorization Without Overfitting", arXiv 2205.10770.
    """
    return scores.mean_of(scores.predicted == scores.labels)


def rouge_l_recall(generated: Sequence[str], answers: Sequence[str]) -> Tensor:
    """ROUGE-L recall of generated texts, with stemming: longest common subsequence over the answer's words.

    Args:
        generated: [N] texts.
        answers: [N] true answers.

    Returns:
        [N] fp64 in [0, 1].

    Raises:
        ImportError: `rouge_score` is not installed.
        ValueError: texts that do not pair up, or none.

    Source:
        Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"; open-unlearning's rougeL_recall.
    """
    if len(generated) != len(answers) or not answers:
        raise ValueError(f"generated must be one text for each answer, got {len(generated)} for {len(answers)}")
    scorer = rouge_scorer()
    recalls = [scorer.score(answer, text)["rougeL"].recall for text, answer in zip(generated, answers, strict=True)]
    return torch.tensor(recalls, dtype=torch.float64)


def rouge_scorer() -> Any:
    """What `rouge_l_recall` counts with.

    Raises:
        ImportError: `rouge_score` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs rouge_score: pip install rouge_score") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def _check_answers(correct: Tensor, wrong: Tensor) -> None:
    if correct.ndim != 1 or wrong.ndim != 2 or len(wrong) != len(correct) or not math.prod(wrong.shape):
        raise ValueError(
            f"correct and wrong must have shapes [N] and [N, K], got {tuple(correct.shape)} and {tuple(wrong.shape)}"
        )


def _check_some(name: str, values: Tensor) -> None:
    if values.ndim != 1 or not len(values) or not (values >= 0).all():
        raise ValueError(f"{name} must be at least one ratio that is not negative, got {values.tolist()[:5]}")
