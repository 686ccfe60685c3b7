"""The tables of an experiment, for its Markdown file and its page alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pymape.experiments.kinds import KINDS
from pymape.experiments.summaries import EVERYWHERE
from pymape.metrics.evaluation import METRICS
from pymape.report import Row, Table

__all__ = [
    "MEMORY",
    "SELECTION_RULE",
    "comparison_tables",
    "evidence_tables",
    "figure_text",
    "interval_text",
    "markdown",
    "result_table",
    "share_text",
]

SELECTION_RULE = (
    "Every method tries as many values of its one tuned parameter (the learning rate; for one-shot objectives their "
    "own parameter). One rule chooses for all: minimise |A_forget - target| + |A_retain - A_retain(original)| + "
    "|A_val - A_val(original)|, target 0 for a class and the original's validation accuracy for all else; the first "
    "of equals wins. Where runs are looked at on their way, it chooses the step as well. Neither the test records nor "
    "the retrained model have a part in it."
)
_INTERVALS = (
    "Difference: figure of the selection minus that of the one it is held against, for the same objective, setting and "
    "seed; negative values favour it. Intervals: percentile bootstrap of the mean over pairs; and Student's t over "
    "the means of pairs that share an original and a retrained model (one setting and seed), which are not "
    "independent. Won: the selection has the smaller figure."
)
_RESULT_COLUMNS = (
    "objective", "trained", *METRICS, "mean gap", "share", "time (s)", "memory (MiB)", "value", "steps", "at edge",
)  # fmt: skip
_RESULT_NOTE = (
    "UA: 100 - accuracy on the forget set. RA, TA: accuracy on the retain and test set. MIA: share of the forget set "
    "that a membership attack calls never seen. All in percent. Mean gap: mean distance to the retrained model over "
    "the four, in points; the smaller, the closer. Trained: which parameters (see the settings below), and their share "
    "of all. Time: of the chosen run alone. Memory: the {}. Value: of the tuned parameter, as chosen. Steps: after "
    "which the rule chose to stop, where it did. At edge: seeds whose choice is the first or last value of the grid. "
    "Retrained again: from other initial weights and in another order; its gap is what chance alone makes."
)
# Figures of memory: the first that was measured is shown.
MEMORY = {
    "added_gpu_mib": "GPU memory that unlearning adds",
    "added_mib": "memory that unlearning adds",
    "peak_cpu_mib": "peak memory of the process",
}
_CLASS_NOTE = " Where a class is forgotten, TA and the attack's test records are those of the remaining classes."
_PAIRED_COLUMNS = ("setting", "objective", "selection", "against", "its own", "the other's", "difference", "won")
_POOLED_COLUMNS = (
    "selection", "against", "setting", "pairs", "difference", "95 % over pairs", "95 % over models",
    "won", "tied", "lost",
)  # fmt: skip
_LOST_COLUMNS = ("selection", "against", "setting", "objective", "seed", "its own", "the other's", "difference")


@dataclass(frozen=True)
class _Column:
    """A column of a table of evidence; words say what it means, for the note.

    Args:
        metric, title, words: name of the figure, heading, and meaning.
        digits: of mean and standard deviation.
        median: show the median over the seeds instead, where None is more than any number.
    """

    metric: str
    title: str
    words: str
    digits: int = 2
    median: bool = False


_AUC = "AUC {}: area under the ROC curve of an attack on {}"
_ATTACKS = (
    _Column(
        "MIA_entropy",
        "MIA, entropy (%)",
        "MIA, entropy: share of the forget set that the same attack as MIA, on the entropy of the prediction, calls "
        "never seen",
        1,
    ),
    _Column(
        "MIA_modified_entropy",
        "MIA, label entropy (%)",
        "MIA, label entropy: the same with an entropy that knows the label",
        1,
    ),
    _Column("mia_loss", "AUC loss", _AUC.format("loss", "the loss")),
    _Column("mia_zlib", "AUC zlib", _AUC.format("zlib", "the loss over the text's compressed length")),
    _Column("mia_min_k", "AUC Min-K", _AUC.format("Min-K", "the least likely tokens")),
    _Column("mia_min_k_plus_plus", "AUC Min-K++", _AUC.format("Min-K++", "the same, normalised over the vocabulary")),
    _Column("mia_reference", "AUC reference", _AUC.format("reference", "the loss less the retrained model's")),
    _Column("mia_gradnorm", "AUC gradient", _AUC.format("gradient", "the norm of the gradient")),
    _Column("mia_lira", "AUC LiRA", _AUC.format("LiRA", "the likelihood under shadow models without the forget set")),
    _Column(
        "privleak",
        "PrivLeak (%)",
        "PrivLeak: relative distance of the AUC of loss (language models: Min-K) to that on the retrained model; 0 is "
        "like it, negative is forgotten too little, positive too much",
        1,
    ),
    _Column(
        "extraction_strength",
        "extraction strength",
        "extraction strength: share of a text that its beginning gives away",
    ),
    _Column("exact_memorization", "exact memorisation", "exact memorisation: share of right next tokens"),
)
_AUC_NOTE = (
    "With an AUC of 1 the attack tells the forgotten from unseen records, with 0.5 it cannot; below 0.5 the forgotten "
    "look the stranger of the two. "
)
_DISTANCES = (
    _Column(
        "logit_kl", "KL", "KL: divergence of the predictions on the forget set from the retrained model's, in nats"
    ),
    _Column("logit_js", "JS", "JS: Jensen-Shannon divergence of the same, at most 0.69"),
    _Column("hidden_cosine", "cosine", "cosine: of the last hidden states of the two models"),
    _Column("hidden_cka", "CKA", "CKA: how alike those states lie among each other, 1 for a mere rotation"),
    _Column(
        "relearning_distance",
        "curve distance",
        "curve distance: mean distance, in points, of the accuracy on the forget set while a tenth of it is learned "
        "again, from the retrained model's",
        1,
    ),
    _Column(
        "relearning_steps",
        "steps to relearn",
        "steps to relearn: median over the seeds of those until that accuracy is within 5 points of the original's",
        median=True,
    ),
)
_ANSWERS = (
    _Column(
        "forget_quality",
        "forget quality",
        "forget quality: p-value of the hypothesis that the truth ratios on the forget set are the retrained model's, "
        "median over the seeds",
        median=True,
    ),
    _Column("forget_truth_ratio", "forget truth ratio", "truth ratio: probability of wrong over that of right answers"),
    _Column("model_utility", "model utility", "model utility: harmonic mean of TOFU's nine figures"),
    _Column("retain_utility", "retain utility", "retain utility: harmonic mean of the three on the retain set"),
    _Column("forget_Q_A_Prob", "forget probability", "probability: of the right answer, mean over its tokens"),
    _Column("forget_Q_A_ROUGE", "forget ROUGE", "ROUGE: share of the right answer in the model's own"),
    _Column("retain_Q_A_Prob", "retain probability", ""),
    _Column("retain_Q_A_ROUGE", "retain ROUGE", ""),
)


def result_table(rows: Sequence[Mapping[str, Any]], task: str, forget: str) -> Table:
    """The four figures of one setting, the mean gap and the cost.

    Args:
        rows: "table" of `summarise_cells`, of one setting.
        task: name of the task.
        forget: what the setting forgets.
    """
    gaps = [row["gap"]["mean"] for row in rows if row["selection"] and row["gap"]["mean"] is not None]
    best = min(gaps, default=None)
    memory = next(name for name in MEMORY if name == "peak_cpu_mib" or any(name in row["metrics"] for row in rows))
    lines = [Row(_result_cells(row, memory), _kind(row, row["gap"]["mean"] == best)) for row in rows]
    accuracy = KINDS[task].accuracy
    note = _RESULT_NOTE.format(MEMORY[memory]) + (f" Accuracy: {accuracy}." if accuracy else "")
    note += _CLASS_NOTE if forget == "class" else ""
    return Table(_RESULT_COLUMNS, lines, labels=2, note=note)


def evidence_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Attacks, distances and answers of one setting, as far as they were measured.

    Args:
        rows: "table" of `summarise_cells`, of one setting.
    """
    kinds = {
        "Membership attacks": (_ATTACKS, _AUC_NOTE),
        "Distance to the retrained model, and relearning": (_DISTANCES, ""),
        "Answers to questions": (_ANSWERS, ""),
    }
    seen = [row for row in rows if row["metrics"]]
    tables = []
    for title, (columns, note) in kinds.items():
        shown = [column for column in columns if any(column.metric in row["metrics"] for row in seen)]
        if shown:
            lines = [
                Row([row["objective"], row["selection"], *(_metric(row, column) for column in shown)], _kind(row))
                for row in seen
            ]
            names = ("objective", "trained", *(column.title for column in shown))
            words = "; ".join(column.words for column in shown if column.words)
            tables.append(Table(names, lines, labels=2, note=f"{note}{words}.", title=title))
    return tables


def comparison_tables(pooled: Sequence[Mapping[str, Any]], paired: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Differences over everything, by objective, and one by one where they were lost.

    Args:
        pooled: "pooled" of `compare`.
        paired: its "paired".
    """
    lost = [
        Row(
            [
                *(str(pair[name]) for name in ("selection", "against", "setting", "objective", "seed")),
                f"{pair['own']:.2f}", f"{pair['other']:.2f}", f"{pair['difference']:+.2f}",
            ]
        )
        for row in pooled
        if row["setting"] == EVERYWHERE
        for pair in row["losses"]
    ]  # fmt: skip
    rows = [Row(_paired_cells(row)) for row in paired]
    by_objective = "By objective, mean and standard deviation over the seeds"
    tables = [
        Table(_POOLED_COLUMNS, [Row(_pooled_cells(row)) for row in pooled], labels=3, note=_INTERVALS),
        Table(_PAIRED_COLUMNS, rows, labels=4, title=by_objective),
    ]
    if lost:
        tables.append(Table(_LOST_COLUMNS, lost, labels=5, title="Every pair that the selection lost"))
    return tables


def markdown(table: Table) -> list[str]:
    """The lines of a table in Markdown."""
    rule = ["---"] * table.labels + ["---:"] * (len(table.columns) - table.labels)
    rows = (table.columns, rule, *(row.cells for row in table.rows))
    return [f"| {' | '.join(cells)} |" for cells in rows]


def figure_text(spread: Mapping[str, Any], digits: int = 1, *, signed: bool = False) -> str:
    """Mean and standard deviation; the mean alone where there is one value, "failed" where there is none."""
    if spread["mean"] is None:
        return "failed"
    mean = f"{spread['mean']:{'+' if signed else ''}.{digits}f}"
    return mean if len(spread["values"]) == 1 else f"{mean} ± {spread['std']:.{digits}f}"


def interval_text(interval: tuple[float, float], digits: int = 2) -> str:
    """Both ends, with their signs."""
    return f"[{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]"


def share_text(share: float) -> str:
    """A share in whole percent."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _kind(row: Mapping[str, Any], best: bool = False) -> str:
    return "reference" if not row["selection"] else "best" if best else ""


def _result_cells(row: Mapping[str, Any], memory: str) -> list[str]:
    reference = not row["selection"]
    name = "" if row["parameter"] == "lr" else f"{row['parameter']} "
    figures = [figure_text(row[metric]) for metric in (*METRICS, "gap")]
    blank = reference or row["gap"]["mean"] is None
    share = "" if blank else f"{100 * row['trained']['mean']:.1f} %"
    used = None if blank else row["metrics"].get(memory, row.get(memory))
    chosen = "" if reference else name + _range_text(row["values"])
    edge = "" if reference else f"{row['at_edge']} of {row['seeds']}"
    return [
        row["objective"],
        row["selection"],
        *figures,
        share,
        figure_text(row["seconds"]),
        "" if used is None else f"{used['mean']:.0f}",
        chosen,
        "" if reference else _range_text([step for steps in row["steps"] for step in steps or ()]),
        edge,
    ]


def _range_text(values: Sequence[float | None]) -> str:
    """The least and the most of the values that are not None."""
    known = sorted({value for value in values if value is not None})
    return " to ".join(f"{value:g}" for value in dict.fromkeys(known[:1] + known[-1:]))


def _metric(row: Mapping[str, Any], column: _Column) -> str:
    """A figure of the evidence; empty where it is not defined."""
    found = row["metrics"].get(column.metric)
    if found is None:
        return ""
    if column.median:
        median = statistics.median(math.inf if value is None else value for value in found["values"])
        return "not reached" if math.isinf(median) else f"{median:.3g}"
    return "" if found["mean"] is None else figure_text(found, column.digits)


def _paired_cells(row: Mapping[str, Any]) -> list[str]:
    names = [row[name] for name in ("setting", "objective", "selection", "against")]
    figures = [figure_text(row["own"], 2), figure_text(row["other"], 2), figure_text(row["difference"], 2, signed=True)]
    return [*names, *figures, f"{row['won']} of {row['pairs']}"]


def _pooled_cells(row: Mapping[str, Any]) -> list[str]:
    names = [row[name] for name in ("selection", "against", "setting")]
    intervals = [interval_text(row[name]) for name in ("interval", "model_interval")]
    share = f"{row['won']} ({share_text(row['won'] / row['pairs'])})"
    return [*names, str(row["pairs"]), f"{row['mean']:+.2f}", *intervals, share, str(row["tied"]), str(row["lost"])]
