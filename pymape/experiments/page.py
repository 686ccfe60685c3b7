"""`pymape report`: one HTML page, and its tables in Markdown, from the folders of experiments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pymape.experiments.tables import (
    EVERYWHERE,
    LOST_COLUMNS,
    PAIRED_COLUMNS,
    POOLED_COLUMNS,
    RESULT_COLUMNS,
    RESULTS,
    SELECTION_RULE,
    lost_pairs,
    paired_cells,
    pool,
    pooled_cells,
    read_cells,
    result_cells,
    summarise_cells,
)
from pymape.report import Figure, Report, Row, Section, Table, flat_settings, run_facts, write_report
from pymape.runs import SUMMARY

__all__ = ["run_report"]

_METRICS = (
    "UA: 100 - accuracy on the forget set. RA, TA: accuracy on the retain and test set. MIA: share of the forget set "
    "that a membership attack calls never seen. All in percent. Mean gap: mean distance to the retrained model over "
    "the four; the smaller, the closer. Values trained: share of all parameters of the model. Time and peak memory (of "
    "the whole process): of the chosen run alone. At edge: seeds whose choice is the first or last value of the grid."
)
_CLASS = " Where a class is forgotten, TA and the attack's test records are those of the remaining classes."
_INTERVALS = (
    "Difference: mean gap of the selection minus that of the one it is held against; negative values favour it. "
    "Intervals: percentile bootstrap of the mean, over pairs, and over groups of pairs that share an original and a "
    "retrained model (one setting and seed), which are not independent."
)
_DRAWN = 4  # selections in a picture


@dataclass(frozen=True)
class _Run:
    """A finished experiment: what its summary says, and what follows from its cells."""

    summary: Mapping[str, Any]
    found: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.summary["name"]


def run_report(runs: Sequence[str], output: str = "report.html") -> None:
    """Write one HTML page about finished experiments.

    Args:
        runs: folders that `pymape experiment run` wrote.
        output: the file to write.

    Raises:
        ValueError: a folder that is no finished experiment.
    """
    read = [_read(Path(run)) for run in runs]
    names = [run.name for run in read]
    if len(set(names)) < len(names):
        raise ValueError(f"runs must be of different experiments, got {', '.join(names)}")
    several = len(read) > 1
    pairs = [
        {**pair, "setting": f"{run.name}: {pair['setting']}" if several else pair["setting"]}
        for run in read
        for pair in run.found["pairs"]
    ]
    pooled = pool(pairs)
    report = Report(
        title=" and ".join(run.summary["config"]["title"] or run.name for run in read),
        lead=(
            "Models were made to forget some of their training records by several methods. Each is held against a "
            "model that was retrained from the same start without those records: the closer, the better."
        ),
        key_figures=_key_figures(read, pooled),
        sections=[
            *(section for run in read for section in _results(run, several)),
            *([_comparison(pooled, read, several)] if pooled else []),
        ],
        settings={"choice within every grid": SELECTION_RULE}
        | {
            f"{run.name}: {name}" if several else name: value
            for run in read
            for name, value in _settings(run.summary["config"]).items()
        },
        command="\n".join(run.summary["command"] for run in read),
        facts={
            f"{run.name}: {name}" if several else name: value
            for run in read
            for name, value in _facts(run.summary).items()
        },
    )
    write_report(output, report)
    print(f"Wrote {output}.")


def _read(folder: Path) -> _Run:
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"runs must be folders of finished experiments, got {str(folder)!r}: {error}") from error
    if summary.get("kind") != "experiment":
        raise ValueError(f"runs must be folders of experiments, got {str(folder)!r} of kind {summary.get('kind')!r}")
    return _Run(summary, summarise_cells(read_cells(folder / RESULTS), summary["config"]["baselines"]))


def _results(run: _Run, several: bool) -> list[Section]:
    config, sections = run.summary["config"], []
    for setting, options in config["settings"].items():
        rows = [row for row in run.found["table"] if row["setting"] == setting]
        gaps = [row["gap"]["mean"] for row in rows if row["selection"] and row["gap"]["mean"] is not None]
        lines = []
        for row in rows:
            best = bool(gaps) and row["gap"]["mean"] == min(gaps)
            kind = "reference" if not row["selection"] else "best" if best else ""
            lines.append(Row(result_cells(row), kind))
        forgotten = [
            row["forgotten"] for row in run.found["chosen"] if row["setting"] == setting and "forgotten" in row
        ]
        seeds = len(config["seeds"])
        text = f"Forgotten: {'; '.join(dict.fromkeys(forgotten))}. "
        text += f"Mean and standard deviation over {seeds} seeds." if seeds > 1 else "One seed: no spread."
        note = _METRICS + (_CLASS if options["forget"] == "class" else "")
        table = Table(RESULT_COLUMNS, lines, labels=2, note=note)
        title = f"{run.name}: {setting}" if several else setting
        sections.append(Section(f"Forgetting, {title}", text, [table], _picture(rows)))
    return sections


def _picture(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Gaps of the objectives that are crossed with the first selections."""
    if find_spec("matplotlib") is None:
        return []
    from pymape.report.plots import bars

    selections = list(dict.fromkeys(row["selection"] for row in rows if row["selection"]))[:_DRAWN]
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["selection"] in selections and row["gap"]["mean"] is not None:
            groups.setdefault(row["objective"], {})[row["selection"]] = row["gap"]["values"]
    groups = {name: series for name, series in groups.items() if list(series) == selections}
    if not groups:
        return []
    shown = "" if len(selections) < _DRAWN else f" The first {_DRAWN} selections are drawn."
    caption = f"Mean gap to the retrained model; bars are means, dots are seeds.{shown}"
    return [Figure(bars(groups, "mean gap (points)"), caption)]


def _comparison(pooled: Sequence[Mapping[str, Any]], runs: Sequence[_Run], several: bool) -> Section:
    paired = []
    for run in runs:
        for row in run.found["paired"]:
            setting = f"{run.name}: {row['setting']}" if several else row["setting"]
            paired.append(Row(paired_cells({**row, "setting": setting})))
    lost = [Row(cells) for cells in lost_pairs(pooled)]
    note = "Every pair that the selection lost." if lost else "No pair was lost."
    tables = [
        Table(POOLED_COLUMNS, [Row(pooled_cells(row)) for row in pooled], labels=3, note=_INTERVALS),
        Table(PAIRED_COLUMNS, paired, labels=4, note="The same by objective, over the seeds."),
        Table(LOST_COLUMNS, lost, labels=4, note=note),
    ]
    return Section("Paired differences", tables=tables)


def _key_figures(runs: Sequence[_Run], pooled: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    figures: dict[str, str] = {}
    for row in pooled:
        if row["setting"] == EVERYWHERE and len(figures) < _DRAWN - 1:
            name = f"points of mean gap, {row['selection']} minus {row['against']}; won {row['won']} of {row['pairs']}"
            figures[name] = f"{row['mean']:+.2f}"
    cells = sum(run.summary["cells"] for run in runs)
    failed = sum(len(run.found["failed"]) for run in runs)
    figures["models unlearned or trained" + (f", {failed} of them failed" if failed else "")] = str(cells)
    return figures


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """The options of a run; a selection in one line, without what it leaves at the default."""
    flat = flat_settings({name: value for name, value in config.items() if name not in ("selections", "methods")})
    for name, selection in config["selections"].items():
        flat[f"selection {name}"] = ", ".join(f"{key} {value}" for key, value in selection.items() if value is not None)
    for method in config["methods"]:
        values = ", ".join(f"{value:g}" for value in method["values"])
        tuned = f": {method['parameter']} {values}" if values else ""
        flat[f"method {method['objective']}"] = f"on {', '.join(method['selections'])}{tuned}"
    return flat


def _facts(summary: Mapping[str, Any]) -> dict[str, str]:
    load = summary["load_average"]
    facts = run_facts(summary)
    facts["cost"] = (
        f"{summary['computed']} of {summary['cells']} cells computed in {summary['seconds']:.0f} s by "
        f"{summary['workers']} processes of one thread on {summary['processors']} cores, load average "
        f"{load['start'][0]:.1f} before and {load['end'][0]:.1f} after"
    )
    return facts
