"""`pymape evaluate`: every figure of a model folder, with the scores that it was computed from."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from pymape.config import DataConfig, EvaluateConfig, UnlearnConfig
from pymape.data.tables import load_ids, load_records, read_table, split_forget
from pymape.errors import check_ranges
from pymape.losses import LANGUAGE_MODEL, task_of
from pymape.metrics.costs import measure_cost
from pymape.metrics.distances import model_distance
from pymape.metrics.evaluation import check_shadows, score_metrics
from pymape.metrics.relearning import relearning_attack
from pymape.metrics.scores import RecordScores, record_scores
from pymape.metrics.tofu import AnswerScores, QuestionSet, score_answers, tofu_metrics
from pymape.report import aligned
from pymape.storage.runs import environment, quiet_transformers, run_folder, write_summary

__all__ = ["run_evaluate"]

# Names of the question sets in metrics -> options that hold their files.
_QUESTIONS = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a model, print its figures and write them with the scores of every record.

    The output folder gets `scores/MODEL/SET.safetensors` (`RecordScores`), `scores/MODEL/questions-SET/`
    (`AnswerScores`), with a retrained model `distances-forget.safetensors`, and `summary.json`: the metrics by name, as
    open-unlearning names them where it has them, beside what it takes to repeat the run. There null stands for a metric
    that is not defined, or for relearning steps that did not suffice. Where there are questions about the forget set,
    extraction strength and exact memorisation are those of their answers.

    Args:
        config: the options.

    Returns:
        What `summary.json` holds.

    Raises:
        ValueError: an option out of range, or data that cannot be used; nothing is left behind then.
        ImportError: ROUGE is asked for and `rouge_score` is not installed.
        OSError: a model folder that cannot be read.
    """
    _check(config)
    with run_folder(config.output, "evaluate", _inputs(config)) as folder, quiet_transformers():
        with measure_cost() as cost:
            metrics, facts = _Evaluation(config, folder).run()
        figures = metrics | cost.figures()
        summary = {**figures, **environment(), "kind": "evaluate", "config": dataclasses.asdict(config), **facts}
        summary["metrics"] = list(figures)
        write_summary(folder, summary)
    rows = [["metric", "value"], *([name, f"{value:.4g}"] for name, value in figures.items())]
    print("\n".join([*aligned(rows), "", f"Wrote summary.json and the scores to {config.output}."]))
    return summary


def _inputs(config: EvaluateConfig) -> list[str | None]:
    """Files and folders that an evaluation reads."""
    data = config.data
    models = [config.model, config.retrained, config.original, config.reference, *config.shadows]
    questions = [getattr(config.questions, option) for option in _QUESTIONS.values()]
    return [*models, data.path, data.forget, data.retain, data.test, *questions]


class _Evaluation:
    """The models one after the other, and the figures that their scores give."""

    def __init__(self, config: EvaluateConfig, folder: Path) -> None:
        self.config, self.folder, data = config, folder, config.data
        self.source = load_records(data.path, data.id_column, argument="data.path")
        if data.forget is None:
            raise ValueError("data.forget must be a file of the ids that were to be forgotten, got none")
        forget = load_ids(data.forget, data.id_column, argument="data.forget")
        retain = data.retain and load_ids(data.retain, data.id_column, argument="data.retain")
        self.split = split_forget(self.source.ids, forget, retain or None)
        self.test = None if data.test is None else read_table(data.test, "data.test")
        self.questions = {
            name: QuestionSet.from_columns(read_table(path, f"questions.{option}"), f"questions.{option}")
            for name, option in _QUESTIONS.items()
            if (path := getattr(config.questions, option)) is not None
        }
        self.end_token: int | None = None
        self.task = ""
        self.classes: dict[str, int] = {}

    def run(self) -> tuple[dict[str, float], dict[str, Any]]:
        """All metrics by name, and what else is to be said: figures of the other models, counts, the curve."""
        config = self.config
        model, tokenizer, sets, collate = self._load(config.model)
        self.end_token, self.task = tokenizer.eos_token_id, task_of(model)
        self.classes = model.config.label2id or {}
        check_shadows(len(config.shadows), self.task)
        scores, answers = self._score("model", model, tokenizer, sets, collate)
        others: dict[str, tuple[dict[str, RecordScores], dict[str, AnswerScores]]] = {}
        distances: dict[str, float] = {}
        for name in ("retrained", "original"):
            path = getattr(config, name)
            if path is not None:
                other, *rest = self._load_other(name, path)
                others[name] = self._score(name, other, *rest)
                if name == "retrained":
                    distances = self._distances(model, other, sets["forget"], collate)
                del other
        retrained, retrained_answers = others.get("retrained", (None, {}))
        metrics = self._metrics(
            scores,
            retrained=retrained,
            reference=None if config.reference is None else self._outsider("reference", config.reference),
            shadows=[self._outsider(f"shadow-{number}", path) for number, path in enumerate(config.shadows)],
        )
        metrics |= self._tofu(answers, retrained_answers.get("forget")) | distances
        facts: dict[str, Any] = {
            "task": scores["forget"].task,
            "records": {name: len(rows) for name, rows in sets.items()},
            "data_fingerprint": self.source.fingerprint(),
            "models": {name: self._metrics(found) | self._tofu(asked) for name, (found, asked) in others.items()},
        }
        if config.relearn.steps:
            options = dataclasses.asdict(config.relearn) | {"seed": config.seed, "collate_fn": collate}
            original = others["original"][0]["forget"].predictions().accuracy
            curve = relearning_attack(model, sets["forget"], original_accuracy=original, **options)
            facts["relearning"] = dataclasses.asdict(curve)
            metrics["relearning_steps"] = math.inf if curve.steps_to_relearn is None else curve.steps_to_relearn
        return metrics, facts

    def _load(self, path: str) -> tuple[Any, Any, dict[str, list[dict[str, Any]]], Any]:
        """A model, its tokenizer, the sets encoded for it, and how they are collated."""
        from pymape.checkpoint import load_model  # loads transformers
        from pymape.commands.encoding import Encoder

        config = UnlearnConfig(path, self.config.data)
        model, tokenizer = load_model(config, self.source)
        encode = Encoder(config, model, tokenizer)
        records = encode(self.source.columns, "data.path", self.source.ids)
        sets = {name: [records[row] for row in getattr(self.split, name)] for name in ("forget", "retain")}
        if self.test is not None:
            sets["test"] = encode(self.test, "data.test")
        return model, tokenizer, sets, encode.collate

    def _score(
        self, name: str, model: Any, tokenizer: Any, sets: dict[str, Any], collate: Any, ask: bool = True
    ) -> tuple[dict[str, RecordScores], dict[str, AnswerScores]]:
        """Scores of one model, written to its folder."""
        language = task_of(model) == LANGUAGE_MODEL
        if self.questions and not language:
            raise ValueError(f"questions need a causal language model, got {type(model).__name__}")
        folder, batch_size = self.folder / "scores" / name, self.config.batch_size
        found = {}
        for part, rows in sets.items():
            found[part] = record_scores(
                model,
                rows,
                batch_size=batch_size,
                collate_fn=collate,
                gradients=self.config.gradients and ask and part != "retain",
                decode=(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)) if language else None,
            )
            found[part].save(folder / f"{part}.safetensors")
        answers = {}
        for part, questions in self.questions.items() if ask else ():
            answers[part] = score_answers(
                model,
                tokenizer,
                questions,
                template=self.config.questions.template,
                max_length=self.config.data.max_length,
                batch_size=batch_size,
                max_new_tokens=self.config.questions.max_new_tokens,
            )
            answers[part].save(folder / f"questions-{part}")
        return found, answers

    def _load_other(self, name: str, path: str) -> tuple[Any, Any, dict[str, list[dict[str, Any]]], Any]:
        """Another model than the evaluated one; for the same task."""
        loaded = self._load(path)
        if (task := task_of(loaded[0])) != self.task:
            raise ValueError(f"{name} must be a model for {self.task}, as model is, got one for {task}")
        own, others = self.classes, loaded[0].config.label2id or {}
        moved = sorted(label for label in own.keys() & others.keys() if own[label] != others[label])
        if moved and name == "retrained":  # distances compare classes place by place
            raise ValueError(
                f"{name} must order its classes as model does, got {moved[0]!r} as class {others[moved[0]]} instead of "
                f"{own[moved[0]]}"
            )
        return loaded

    def _outsider(self, name: str, path: str) -> dict[str, RecordScores]:
        """Scores of a model that has not seen the records, on what is attacked."""
        model, tokenizer, sets, collate = self._load_other(name, path)
        del sets["retain"]
        return self._score(name, model, tokenizer, sets, collate, ask=False)[0]

    def _distances(self, model: Any, retrained: Any, forget: list[dict[str, Any]], collate: Any) -> dict[str, float]:
        distance = model_distance(model, retrained, forget, batch_size=self.config.batch_size, collate_fn=collate)
        distance.save(self.folder / "distances-forget.safetensors")
        return distance.figures()

    def _tofu(self, answers: dict[str, AnswerScores], retrained: AnswerScores | None = None) -> dict[str, float]:
        return tofu_metrics(answers, retrained=retrained, end_token=self.end_token) if answers else {}

    def _metrics(self, scores: dict[str, RecordScores], **others: Any) -> dict[str, float]:
        return score_metrics(scores, end_token=self.end_token, k=self.config.k, seed=self.config.seed, **others)


def _check(config: EvaluateConfig) -> None:
    relearn = config.relearn
    ranges = {
        "k": (config.k, 0 < config.k <= 1, "in (0, 1]"),
        "batch_size": (config.batch_size, config.batch_size >= 1, "at least 1"),
        "data.max_length": (config.data.max_length, config.data.max_length >= 2, "at least 2"),
        "questions.max_new_tokens": (
            config.questions.max_new_tokens,
            config.questions.max_new_tokens >= 0,
            "not negative",
        ),
        "relearn.steps": (relearn.steps, relearn.steps >= 0, "not negative"),
        "relearn.lr": (relearn.lr, 0 < relearn.lr < math.inf, "positive and finite"),
        "relearn.share": (relearn.share, 0 < relearn.share <= 1, "in (0, 1]"),
        "relearn.batch_size": (relearn.batch_size, relearn.batch_size >= 1, "at least 1"),
        "relearn.every": (relearn.every, relearn.every >= 1, "at least 1"),
        "shadows": (len(config.shadows), len(config.shadows) != 1, "none, or two or more"),
    }
    check_ranges(ranges)
    for name in ("unseen", "importance_samples", "alternative_column"):
        given = getattr(config.data, name)
        if given != getattr(DataConfig, name):
            raise ValueError(f"data.{name} must be left out of evaluate, which reads none of it, got {given!r}")
    if relearn.steps and config.original is None:
        raise ValueError("relearn.steps must come with original, whose accuracy is to be reached again, got none")
    attacked = [name for name in ("reference", "shadows") if getattr(config, name)]
    if attacked and config.data.test is None:
        raise ValueError(f"{attacked[0]} must come with data.test, which the attack compares with, got none")
