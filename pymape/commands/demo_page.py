"""What the demo tells its reader: the tables on the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymape.metrics import METRICS, Predictions
from pymape.report import (
    Figure,
    Report,
    Row,
    Section,
    Table,
    aligned,
    evidence_section,
    flat_settings,
    run_facts,
    write_report,
)

if TYPE_CHECKING:
    from pymape.masks import ModuleMasks

__all__ = ["Evidence", "summary_text", "write_page"]

_COLUMNS = ("model", "trained", *METRICS, "mean gap", "time (s)", "lr")
_PAIRED_COLUMNS = ("setting", "objective", "masked", "unmasked", "difference", "masks closer")
_SETTINGS = {"class": "a whole class", "random": "random images"}
_NOTE = (
    "UA: 100 - accuracy on the forgotten images. RA, TA: accuracy on the retained training and on the test images. "
    "MIA: share of the forgotten images that a membership attack calls never seen. All in percent. Mean gap: mean "
    "distance to the retrained model over the four; the smaller, the closer. Time: the chosen run alone."
)
_CLASS_NOTE = " TA and the attack's test images are those of the remaining classes."
_SELECTION = (
    "one grid (lrs) for masked and unmasked alike; minimises |forget accuracy - target| + |retain accuracy - "
    "original's| + |validation accuracy - original's|, target 0 for a class and the original's validation accuracy for "
    "random images; never sees the retrained model or the test images"
)


@dataclass(frozen=True)
class Evidence:
    """What the pictures of one setting show: one objective of a run, its masks, and predictions by model and set."""

    run: Mapping[str, Any]
    objective: str
    masks: ModuleMasks
    models: Mapping[str, Mapping[str, Predictions]]


def summary_text(summary: Mapping[str, Any]) -> str:
    """The tables of a finished demo as plain text."""
    lines = []
    for setting in summary["config"]["settings"]:
        table = [_COLUMNS, *(_cells(row) for row in _rows(summary, setting))]
        lines += [_heading(summary, setting), *aligned(table, labels=2), ""]
    lines += ["Mean gap with the masks minus mean gap without (negative: the masks are closer to retraining)"]
    lines += aligned([_PAIRED_COLUMNS, *_paired_cells(summary)], labels=2)
    lines += ["", *(f"{_cost(summary, setting)}" for setting in summary["config"]["settings"])]
    if "class" in summary["config"]["settings"]:
        lines.append("Forgetting a class: TA is measured on the remaining classes.")
    files = "report.html, summary.json, masks and the unlearned model"
    lines.append(f"Wrote {files} to {summary['config']['output']} in {summary['seconds']:.0f} s.")
    return "\n".join(lines)


def write_page(path: Path, summary: Mapping[str, Any], evidence: Sequence[Evidence]) -> None:
    """Write the demo's HTML report.

    Args:
        path: the file to write.
        summary: what `summary.json` holds.
        evidence: what the pictures show, one per setting.
    """
    settings = summary["config"]["settings"]
    forgotten = " and, separately, ".join(dict.fromkeys(shown.run["forgotten"] for shown in evidence))
    again = "" if summary["config"]["seeds"] == 1 else " (of the first seed; the others forget likewise)"
    report = Report(
        title="Unlearning handwritten digits",
        lead=(
            "A small Vision Transformer was trained on scikit-learn's digits and then made to forget "
            f"{forgotten}{again}. Every unlearned model is held against one that was retrained without those images: "
            "the closer, the better."
        ),
        key_figures=_key_figures(summary),
        sections=[
            *(_result(summary, setting) for setting in settings),
            _comparison(summary),
            *(_closer_look(shown) for shown in evidence),
        ],
        settings={
            "masks": "; ".join(_cost(summary, setting) for setting in settings),
            "choice of learning rate": _SELECTION,
            **flat_settings(summary["config"]),
        },
        command=summary["command"],
        facts=run_facts(summary),
    )
    write_report(path, report)


def _result(summary: Mapping[str, Any], setting: str) -> Section:
    rows = _rows(summary, setting)
    best = min(row["gap"]["mean"] for row in rows if row["masked"] is not None)
    lines = []
    for row in rows:
        kind = "reference" if row["masked"] is None else "best" if row["gap"]["mean"] == best else ""
        lines.append(Row(_cells(row), kind))
    note = _NOTE + (_CLASS_NOTE if setting == "class" else "")
    return Section(_heading(summary, setting), tables=[Table(_COLUMNS, lines, labels=2, note=note)])


def _comparison(summary: Mapping[str, Any]) -> Section:
    several = summary["config"]["seeds"] > 1
    note = "Difference: mean gap with the masks minus mean gap without; negative values are in favour of the masks."
    note += " Means over the seeds, with the sample standard deviation." if several else " One seed: no spread."
    table = Table(_PAIRED_COLUMNS, [Row(cells) for cells in _paired_cells(summary)], labels=2, note=note)
    figures = []
    if find_spec("matplotlib") is not None:
        from pymape.report.plots import bars

        groups = {
            f"{row['objective']}\n{row['setting']}": {
                "all parameters": row["unmasked"]["values"],
                "learned masks": row["masked"]["values"],
            }
            for row in summary["paired"]
        }
        caption = "Mean gap to the retrained model; bars are means, dots are seeds. Lower is closer to retraining."
        figures = [Figure(bars(groups, "mean gap (points)"), caption)]
    return Section("With masks and without", tables=[table], figures=figures)


def _closer_look(shown: Evidence) -> Section:
    run = shown.run
    method = next(row for row in run["methods"] if row["masked"] and row["objective"] == shown.objective)
    text = (
        f"Forgotten: {run['forgotten']} (seed {run['seed']}), with {shown.objective} at learning rate {method['lr']:g} "
        f"on the masks, which hold {run['masks']['cost']:.1%} of the heads' and filters' parameters. Forget set "
        f"{run['records']['forget']} images, retain set {run['records']['retain']}, test set {run['records']['test']}."
    )
    return evidence_section(f"A closer look at forgetting {_SETTINGS[run['setting']]}", text, shown.masks, shown.models)


def _heading(summary: Mapping[str, Any], setting: str) -> str:
    seeds = summary["config"]["seeds"]
    forgotten = next(run["forgotten"] for run in summary["runs"] if run["setting"] == setting)
    detail = forgotten if seeds == 1 else f"mean and standard deviation over {seeds} seeds"
    return f"Forgetting {_SETTINGS[setting]}: {detail}"


def _rows(summary: Mapping[str, Any], setting: str) -> list[Mapping[str, Any]]:
    return [row for row in summary["table"] if row["setting"] == setting]


def _cells(row: Mapping[str, Any]) -> list[str]:
    trained = "everything" if row["masked"] is None else "learned masks" if row["masked"] else "all parameters"
    lrs = sorted(row.get("lrs", []))
    chosen = " to ".join(dict.fromkeys(f"{lr:g}" for lr in (lrs[0], lrs[-1]))) if lrs else ""
    figures = [_figure(row[name]) for name in (*METRICS, "gap")]
    return [row["model"], trained, *figures, _figure(row["seconds"]), chosen]


def _paired_cells(summary: Mapping[str, Any]) -> list[list[str]]:
    seeds = summary["config"]["seeds"]
    return [
        [
            row["setting"], row["objective"], _figure(row["masked"], 2), _figure(row["unmasked"], 2),
            _figure(row["difference"], 2, signed=True), f"{row['wins']} of {seeds}",
        ]
        for row in summary["paired"]
    ]  # fmt: skip


def _cost(summary: Mapping[str, Any], setting: str) -> str:
    config = summary["config"]
    found = [run["masks"] for run in summary["runs"] if run["setting"] == setting]
    cost, seconds = (sum(masks[name] for masks in found) / len(found) for name in ("cost", "seconds"))
    return (
        f"{setting}: budget {config['budget']:.0%}, lambda {config[f'{setting}_lam']:g}, {cost:.1%} of the heads' and "
        f"filters' parameters selected, learned in {seconds:.1f} s"
    )


def _key_figures(summary: Mapping[str, Any]) -> dict[str, str]:
    figures = {}
    for setting in summary["config"]["settings"]:
        found = [row for row in summary["paired"] if row["setting"] == setting]
        masked, unmasked = (sum(row[kind]["mean"] for row in found) / len(found) for kind in ("masked", "unmasked"))
        figures[f"mean gap, {_SETTINGS[setting]}: learned masks / all parameters"] = f"{masked:.1f} / {unmasked:.1f}"
    comparisons = sum(len(row["masked"]["values"]) for row in summary["paired"])
    figures["comparisons won by the masks"] = f"{sum(row['wins'] for row in summary['paired'])} of {comparisons}"
    figures["seconds in all"] = f"{summary['seconds']:.0f}"
    return figures


def _figure(spread: Mapping[str, Any], digits: int = 1, *, signed: bool = False) -> str:
    mean = f"{spread['mean']:{'+' if signed else ''}.{digits}f}"
    return mean if len(spread["values"]) == 1 else f"{mean} ± {spread['std']:.{digits}f}"
