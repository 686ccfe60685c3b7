"""TOFU's protocol: what a language model answers to questions about what it was to forget, to keep and to know."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pymape.metrics.generation import TEMPLATE, answer_records, answer_text, generate_answers
from pymape.metrics.language import (
    exact_memorization,
    extraction_strength,
    forget_quality,
    forget_truth_ratio,
    model_utility,
    option_probabilities,
    rouge_l_recall,
    rouge_scorer,
    true_better,
    truth_ratios,
)
from pymape.metrics.scores import RecordScores, read_rows, record_scores, write_rows

__all__ = ["AnswerScores", "QuestionSet", "score_answers", "tofu_metrics"]

_ROUGE = "pymape.rouge.1"
_UTILITY = {
    "retain": ("Q_A_Prob", "Q_A_ROUGE", "Truth_Ratio"),
    "ra": ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio"),
    "wf": ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio"),
}


@dataclass(frozen=True)
class QuestionSet:
    """N questions with their true answers and K wrong ones each.

    Attributes:
        ids: [N] ids.
        questions: [N] texts.
        answers: [N] texts.
        perturbed: [N] lists of K wrong answers in the form of the paraphrased one.
        paraphrased: [N] the true answers in other words; None where a set has none.
    """

    ids: list[str]
    questions: list[str]
    answers: list[str]
    perturbed: list[list[str]]
    paraphrased: list[str] | None = None

    def __post_init__(self) -> None:
        counts = {len(wrong) for wrong in self.perturbed}
        if not self.ids or len(counts) != 1 or 0 in counts:
            raise ValueError(
                f"perturbed must be as many answers for every question, at least one, got {sorted(counts)} "
                f"for {len(self.ids)} questions"
            )

    @classmethod
    def from_columns(cls, columns: Mapping[str, Sequence[Any]], argument: str = "questions") -> QuestionSet:
        """Take TOFU's columns question, answer, perturbed_answer and, where it is there, paraphrased_answer.

        Args:
            columns: column name to [N] values; ids are the row numbers.
            argument: the option's name in error messages.

        Raises:
            ValueError: a column that is missing, or wrong answers that are not a list.
        """
        missing = [name for name in ("question", "answer", "perturbed_answer") if name not in columns]
        if missing:
            raise ValueError(f"{argument} must have the columns {', '.join(missing)}, got {sorted(columns)}")
        perturbed = columns["perturbed_answer"]
        if not all(isinstance(wrong, list | tuple) for wrong in perturbed):
            raise ValueError(f"{argument} must have a list of texts in every perturbed_answer, got something else")
        return cls(
            [str(row) for row in range(len(perturbed))],
            list(columns["question"]),
            list(columns["answer"]),
            [list(wrong) for wrong in perturbed],
            list(columns["paraphrased_answer"]) if "paraphrased_answer" in columns else None,
        )


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """Scores of one model on a `QuestionSet`.

    Attributes:
        answer: of the N true answers.
        perturbed: of the N K wrong ones, question by question.
        paraphrased: of the N paraphrased ones; None where there are none.
        rouge: [N] ROUGE-L recall of what the model answers by itself; None where it was not asked.
    """

    answer: RecordScores
    perturbed: RecordScores
    paraphrased: RecordScores | None = None
    rouge: Tensor | None = None

    @property
    def truth_ratios(self) -> Tensor:
        """[N] fp64, see `language.truth_ratios`; without paraphrases the true answers stand in for them."""
        return truth_ratios((self.paraphrased or self.answer).loss, self._wrong_losses)

    @property
    def option_probabilities(self) -> Tensor:
        """[N] fp64, see `language.option_probabilities`."""
        return option_probabilities(self.answer.loss, self._wrong_losses)

    @property
    def _wrong_losses(self) -> Tensor:
        return self.perturbed.loss.view(len(self.answer), -1)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write one safetensors file for each kind of answer."""
        for name in ("answer", "perturbed", "paraphrased", "rouge"):
            scores, path = getattr(self, name), Path(folder) / f"{name}.safetensors"
            if scores is None:
                path.unlink(missing_ok=True)  # of an earlier save
            elif name == "rouge":
                write_rows(path, _ROUGE, self.answer.ids, {name: scores})
            else:
                scores.save(path)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AnswerScores:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file that must be there is not.
            ValueError: a file that is truncated, corrupt or of another kind.
        """
        paths = {name: Path(folder) / f"{name}.safetensors" for name in ("answer", "perturbed", "paraphrased", "rouge")}
        paraphrased = RecordScores.load(paths["paraphrased"]) if paths["paraphrased"].exists() else None
        rouge = read_rows(paths["rouge"], _ROUGE)[1]["rouge"] if paths["rouge"].exists() else None
        return cls(RecordScores.load(paths["answer"]), RecordScores.load(paths["perturbed"]), paraphrased, rouge)


def score_answers(
    model: nn.Module,
    tokenizer: Any,
    questions: QuestionSet,
    *,
    template: str = TEMPLATE,
    max_length: int = 512,
    batch_size: int = 32,
    max_new_tokens: int = 200,
) -> AnswerScores:
    """Score every answer, true, paraphrased and wrong, and let the model answer by itself.

    Args:
        model: causal language model, where it is to run.
        tokenizer: its fast tokenizer.
        questions: the questions.
        template: text of a record with {question} and {answer}, as the model was trained with.
        max_length: tokens a text is cut to.
        batch_size: records per forward pass.
        max_new_tokens: most tokens of the model's own answer; 0 leaves ROUGE out.

    Returns:
        The scores.

    Raises:
        ValueError: see `answer_records`.
        ImportError: `rouge_score` is not installed and `max_new_tokens` is not 0.
    """
    if max_new_tokens:
        rouge_scorer()  # shows before the work whether it is installed

    def records(asked: Sequence[str], answers: Sequence[str], ids: Sequence[str]) -> list[dict[str, Any]]:
        return answer_records(tokenizer, asked, answers, ids=ids, template=template, max_length=max_length)

    def scores(rows: list[dict[str, Any]]) -> RecordScores:
        return record_scores(model, rows, batch_size=batch_size, decode=lambda tokens: _text(tokenizer, tokens))

    true = records(questions.questions, questions.answers, questions.ids)
    kinds = len(questions.perturbed[0])
    wrong = records(
        [question for question in questions.questions for _ in range(kinds)],
        [answer for answers in questions.perturbed for answer in answers],
        [f"{name}/{kind}" for name in questions.ids for kind in range(kinds)],
    )
    paraphrased = None
    if questions.paraphrased is not None:
        paraphrased = scores(records(questions.questions, questions.paraphrased, questions.ids))
    rouge = None
    if max_new_tokens:
        said = generate_answers(model, tokenizer, true, max_new_tokens=max_new_tokens, batch_size=batch_size)
        rouge = rouge_l_recall(said, [answer_text(tokenizer, record) for record in true])
    return AnswerScores(scores(true), scores(wrong), paraphrased, rouge)


def tofu_metrics(
    sets: Mapping[str, AnswerScores], *, retrained: AnswerScores | None = None, end_token: int | None = None
) -> dict[str, float]:
    """TOFU's figures by open-unlearning's names.

    Args:
        sets: scores on "forget", "retain", "ra" (real authors) and "wf" (world facts), as far as they are wanted.
        retrained: scores of the model trained on the retain set only, on the forget questions.
        end_token: end-of-text token, which extraction strength and exact memorisation leave out.

    Returns:
        For every set its "_Q_A_Prob", "_Q_A_PERT_Prob", where there are paraphrases "_Q_A_PARA_Prob", where the model
        answered "_Q_A_ROUGE". On the forget set "forget_truth_ratio", "extraction_strength", "exact_memorization" and
        "forget_quality" against `retrained`; on the others "_Truth_Ratio" (`true_better`), and "_Q_A_Prob_normalised"
        on the two that have no paraphrases. "model_utility" is the harmonic mean of TOFU's nine; where real authors
        or world facts were not asked, "retain_utility" is that of the retain set's three.

    Raises:
        ValueError: a set of another name, or a retrained model's scores of other questions.
    """
    unknown = set(sets) - {"forget", *_UTILITY}
    if unknown or not sets:
        raise ValueError(f"sets must be among forget, {', '.join(_UTILITY)}, got {sorted(sets)}")
    figures: dict[str, float] = {}
    for name, scores in sets.items():
        figures[f"{name}_Q_A_Prob"] = scores.answer.probability.mean().item()
        figures[f"{name}_Q_A_PERT_Prob"] = scores.perturbed.probability.mean().item()
        if scores.paraphrased is not None:
            figures[f"{name}_Q_A_PARA_Prob"] = scores.paraphrased.probability.mean().item()
        if scores.rouge is not None:
            figures[f"{name}_Q_A_ROUGE"] = scores.rouge.mean().item()
        if name == "forget":
            own = scores.answer.without_final(end_token)
            figures["forget_truth_ratio"] = forget_truth_ratio(scores.truth_ratios)
            figures["extraction_strength"] = extraction_strength(own).mean().item()
            figures["exact_memorization"] = exact_memorization(own).mean().item()
            if retrained is not None:
                scores.answer.require_same_records(retrained.answer, "retrained")
                figures["forget_quality"] = forget_quality(scores.truth_ratios, retrained.truth_ratios)
        else:
            figures[f"{name}_Truth_Ratio"] = true_better(scores.truth_ratios)
            if name != "retain":
                figures[f"{name}_Q_A_Prob_normalised"] = scores.option_probabilities.mean().item()
    names = {name: [f"{name}_{figure}" for figure in wanted] for name, wanted in _UTILITY.items()}
    if all(figure in figures for wanted in names.values() for figure in wanted):
        figures["model_utility"] = model_utility({name: figures[name] for wanted in names.values() for name in wanted})
    elif all(figure in figures for figure in names["retain"]):
        figures["retain_utility"] = model_utility({name: figures[name] for name in names["retain"]})
    return figures


def _text(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
