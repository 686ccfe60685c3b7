"""One model's figures: how well it forgot, what it kept, whether it can be told that it forgot, and what that cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import nn

from pymape.losses import CLASSIFICATION, LANGUAGE_MODEL, task_of
from pymape.metrics.classification import Predictions, entropies, modified_entropies, scaled_confidences
from pymape.metrics.costs import measure_cost
from pymape.metrics.distances import model_distance
from pymape.metrics.language import exact_memorization, extraction_strength
from pymape.metrics.membership import lira_scores, membership_attack, membership_auc, membership_aucs, privleak
from pymape.metrics.scores import RecordScores, record_scores

__all__ = ["METRICS", "check_shadows", "evaluate", "mean_gap", "score_metrics", "summarise"]

METRICS = ("UA", "RA", "TA", "MIA")


def evaluate(
    model: nn.Module,
    *,
    forget: Sequence[dict[str, Any]],
    retain: Sequence[dict[str, Any]],
    test: Sequence[dict[str, Any]] | None = None,
    batch_size: int = 128,
    collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    seed: int = 0,
    retrained: nn.Module | None = None,
    reference: nn.Module | None = None,
    shadows: Sequence[nn.Module] = (),
    gradients: bool = False,
    decode: Callable[[list[int]], str] | None = None,
    end_token: int | None = None,
) -> dict[str, float]:
    """Measure a model, with everything that the given data and other models allow.

    Args:
        model: Hugging Face model with a task head: a text or image classifier, for question answering, or a causal LM.
        forget: records the model should not know.
        retain: records it should know.
        test: records it has never seen; for class forgetting pass the remaining classes only.
        batch_size: records per forward pass.
        collate_fn: makes one batch of a list of records; default: pad on the right and stack.
        seed: seed of the attack's draw.
        retrained: the model retrained without the forget set: adds "gap", "privleak" and the distances on the forget
            set of `ModelDistance.figures`.
        reference: a model that has not seen the records, for "mia_reference".
        shadows: two or more classifiers that have seen neither the forget nor the test set, for "mia_lira".
        gradients: also attack by gradient norms, one backward pass per record.
        decode: token ids -> text, for the zlib attack on language models.
        end_token: a language model's end-of-text token.

    Returns:
        The figures of `score_metrics`, and of measuring them "wall_seconds", "cpu_seconds", "peak_cpu_mib" and on CUDA
        "peak_gpu_mib".
    """
    sets = {"forget": forget, "retain": retain} | ({} if test is None else {"test": test})
    for name, others in (("reference", reference), ("shadows", shadows)):
        if others and test is None:
            raise ValueError(f"{name} must come with test, which the attack compares with, got none")
    check_shadows(len(shadows), task_of(model))

    def scores(network: nn.Module, names: Iterable[str] = sets, gradients: bool = False) -> dict[str, RecordScores]:
        options: dict[str, Any] = {"batch_size": batch_size, "collate_fn": collate_fn, "decode": decode}
        return {
            name: record_scores(network, sets[name], gradients=gradients and name != "retain", **options)
            for name in names
        }

    attacked = [name for name in sets if name != "retain"]
    with measure_cost() as cost:
        figures = score_metrics(
            scores(model, gradients=gradients),
            retrained=None if retrained is None else scores(retrained),
            reference=None if reference is None else scores(reference, attacked),
            shadows=[scores(shadow, attacked) for shadow in shadows],
            end_token=end_token,
            seed=seed,
        )
        if retrained is not None:
            distance = model_distance(model, retrained, forget, batch_size=batch_size, collate_fn=collate_fn)
            figures |= distance.figures()
    return figures | cost.figures()


def check_shadows(count: int, task: str) -> None:
    """Refuse shadow models that the likelihood-ratio attack could not use.

    Raises:
        ValueError: a single one, or any for a model that is no classifier.
    """
    if count == 1:
        raise ValueError("shadows must be none, or two or more, got 1")
    if count and task != CLASSIFICATION:
        raise ValueError(f"shadows must be left out for a model for {task}, got {count}")


def score_metrics(
    sets: Mapping[str, RecordScores],
    *,
    retrained: Mapping[str, RecordScores] | None = None,
    reference: Mapping[str, RecordScores] | None = None,
    shadows: Sequence[Mapping[str, RecordScores]] = (),
    end_token: int | None = None,
    k: float = 0.4,
    seed: int = 0,
) -> dict[str, float]:
    """Every figure that follows from scores, by name; no model is needed.

    Args:
        sets: scores on "forget", "retain" and, for all attacks, "test".
        retrained: the retrained model's on the same sets.
        reference: those of a model that has not seen the records, on "forget" and "test".
        shadows: those of two or more classifiers that have seen neither "forget" nor "test", on both.
        end_token: token to leave out at the end of a text in Min-K, extraction strength and exact memorisation.
        k: share of tokens in Min-K and Min-K++.
        seed: seed of the draw of the support vector attack.

    Returns:
        "UA", "RA", and with a test set "TA" and "MIA" (see `summarise`); "forget_loss" and so on, in nats; for
        classifiers "MIA_entropy" and "MIA_modified_entropy", the same attack on entropies, and "mia_lira"; for causal
        LMs "extraction_strength" and "exact_memorization" on the forget set; the AUCs of `membership_aucs`; and with a
        retrained model "gap" (`mean_gap`) and "privleak" (Min-K; the loss for classifiers).

    Raises:
        ValueError: a set is missing, or the sets of two models hold other records.
    """
    wanted = {"forget", *sets} - {"retain"}
    _require_sets(sets, {"forget", "retain"}, "sets", sets)
    for argument, others, names in (("retrained", retrained, set(sets)), ("reference", reference, wanted)):
        if others is not None:
            _require_sets(others, names, argument, sets)
    check_shadows(len(shadows), sets["forget"].task)
    for shadow in shadows:
        _require_sets(shadow, wanted, "shadows", sets)
    forget, classifier = sets["forget"], sets["forget"].logits is not None
    figures = _summary(sets, seed)
    figures |= {f"{name}_loss": scores.loss.mean().item() for name, scores in sets.items()}
    if forget.task == LANGUAGE_MODEL:
        own = forget.without_final(end_token)
        figures["extraction_strength"] = extraction_strength(own).mean().item()
        figures["exact_memorization"] = exact_memorization(own).mean().item()
    if "test" in sets:
        pair = None if reference is None else (reference["forget"], reference["test"])
        aucs = membership_aucs(forget, sets["test"], reference=pair, end_token=end_token, k=k)
        figures |= aucs
        if classifier:
            figures |= _entropy_attacks(sets, seed)
        if shadows:
            figures["mia_lira"] = _lira(sets, shadows)
        if retrained is not None:
            attack = "mia_min_k" if forget.task == LANGUAGE_MODEL else "mia_loss"
            gold = membership_aucs(retrained["forget"], retrained["test"], end_token=end_token, k=k)[attack]
            figures["privleak"] = privleak(aucs[attack], gold)
    if retrained is not None:
        of_retrained = _summary(retrained, seed)
        figures["gap"] = mean_gap(figures, of_retrained, list(of_retrained))
    return figures


def summarise(
    forget: Predictions, retain: Predictions, test: Predictions | None = None, *, seed: int = 0
) -> dict[str, float]:
    """The four figures from predictions that exist already, or the two that need no test set.

    UA = 100 - accuracy on the forget set; RA, TA = accuracy on the retain and test set; MIA = share of the forget set
    that an attack trained on retain-versus-test confidences calls non-member.

    Args:
        forget: predictions on the forget set.
        retain: predictions on the retain set.
        test: predictions on the test set.
        seed: seed of the attack's draw.

    Returns:
        {"UA", "RA", "TA", "MIA"}, each in [0, 100]; UA and RA alone without a test set.
    """
    figures = {"UA": 100 - forget.accuracy, "RA": retain.accuracy}
    if test is not None:
        attack = membership_attack(retain.confidence, test.confidence, forget.confidence, seed=seed)
        figures |= {"TA": test.accuracy, "MIA": attack.non_member_share}
    return figures


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


def _summary(sets: Mapping[str, RecordScores], seed: int) -> dict[str, float]:
    found = {name: scores.predictions() for name, scores in sets.items()}
    return summarise(found["forget"], found["retain"], found.get("test"), seed=seed)


def _require_sets(
    found: Mapping[str, RecordScores], names: AbstractSet[str], argument: str, sets: Mapping[str, RecordScores]
) -> None:
    missing = names - set(found)
    if missing:
        raise ValueError(f"{argument} must hold scores of {', '.join(sorted(names))}, got none of {sorted(missing)}")
    for name in names:
        sets[name].require_same_records(found[name], argument)


def _entropy_attacks(sets: Mapping[str, RecordScores], seed: int) -> dict[str, float]:
    attacks = {
        "MIA_entropy": lambda scores: entropies(scores.logits),
        "MIA_modified_entropy": lambda scores: modified_entropies(scores.logits, scores.labels),
    }
    return {
        name: membership_attack(
            *(score(sets[part]) for part in ("retain", "test", "forget")), seed=seed
        ).non_member_share
        for name, score in attacks.items()
    }


def _lira(sets: Mapping[str, RecordScores], shadows: Sequence[Mapping[str, RecordScores]]) -> float:
    """AUC of the likelihood-ratio attack; one variance for both sets, which are told apart."""

    def confidences(scores: Mapping[str, RecordScores]) -> torch.Tensor:
        both = [scores["forget"], scores["test"]]
        return torch.cat([scaled_confidences(part.logits, part.labels) for part in both])  # type: ignore[arg-type]

    found = lira_scores(confidences(sets), torch.stack([confidences(shadow) for shadow in shadows]))
    return membership_auc(*found.split([len(sets["forget"]), len(sets["test"])]))
