"""`pymape report`: one HTML page from the folders of experiments."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymape.experiments.claims import Claim, claims
from pymape.experiments.pictures import (
    SavedEvidence,
    example_sections,
    gap_figures,
    glance_figures,
    relearning_figures,
)
from pymape.experiments.sections import (
    claim_sections,
    comparison_sections,
    cost_text,
    data_text,
    glance_sections,
    setting_section,
)
from pymape.experiments.summaries import EVIDENCE, RESULTS, Outcome, read_cells, summarise_cells
from pymape.experiments.tables import SELECTION_RULE
from pymape.report import Report, Section, flat_settings, run_facts, write_report
from pymape.storage.runs import SUMMARY

__all__ = ["run_report"]

_LEAD = (
    "Models were made to forget some of their training records by several methods. Each is held against a model that "
    "was retrained from the same start without those records: the closer, the better."
)


def run_report(runs: Sequence[str], output: str = "report.html") -> None:
    """Write one HTML page about finished experiments.

    Args:
        runs: folders that `pymape experiment run` wrote.
        output: the file to write.

    Raises:
        ValueError: a folder that is no finished experiment, or an output that is a folder.
    """
    if Path(output).is_dir():
        raise ValueError(f"output must be a file to write, got the folder {output!r}")
    read = [_read(Path(run)) for run in runs]
    outcomes = [outcome for outcome, _ in read]
    found, names = claims(outcomes), [outcome.name for outcome in outcomes]
    if len(set(names)) < len(names):
        raise ValueError(f"runs must be of different experiments, got {', '.join(names)}")

    def named(outcome: Outcome, items: Mapping[str, str]) -> dict[str, str]:
        return {f"{outcome.name}: {name}" if len(names) > 1 else name: value for name, value in items.items()}

    report = Report(
        title=" and ".join(outcome.config["title"] or outcome.name for outcome in outcomes),
        lead=" ".join([_LEAD, *(outcome.config["note"] for outcome in outcomes)]).strip(),
        key_figures=_key_figures(outcomes, found),
        sections=[
            *(dataclasses.replace(glance, figures=glance_figures(outcomes)) for glance in glance_sections(outcomes)),
            *claim_sections(found),
            *(section for outcome, evidence in read for section in _settings(outcome, evidence, len(names) > 1)),
            *comparison_sections(outcomes),
        ],
        settings={"choice within every grid": SELECTION_RULE}
        | {name: value for outcome in outcomes for name, value in named(outcome, _options(outcome.config)).items()},
        command="\n".join(outcome.summary["command"] for outcome in outcomes),
        facts={name: value for outcome in outcomes for name, value in named(outcome, _facts(outcome.summary)).items()},
    )
    write_report(output, report)
    print(f"Wrote {output}.")


def _read(folder: Path) -> tuple[Outcome, SavedEvidence]:
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"runs must be folders of finished experiments, got {str(folder)!r}: {error}") from error
    if summary.get("kind") != "experiment":
        raise ValueError(f"runs must be folders of experiments, got {str(folder)!r} of kind {summary.get('kind')!r}")
    seen = read_cells(folder / EVIDENCE) if summary.get("evidence") else []
    found = summarise_cells(read_cells(folder / RESULTS), summary["config"]["baselines"], seen)
    return Outcome(summary, found), SavedEvidence(folder, seen)


def _settings(outcome: Outcome, evidence: SavedEvidence, several: bool) -> list[Section]:
    """Setting by setting: what came of it, how it is relearned, and a closer look at one model."""
    sections = []
    for setting in outcome.config["settings"]:
        section = setting_section(outcome, setting)
        title = f"{outcome.name}: {setting}" if several else setting
        figures = [*gap_figures(outcome, setting), *relearning_figures(outcome, evidence, setting)]
        sections.append(dataclasses.replace(section, title=f"Forgetting, {title}", figures=figures))
        sections += example_sections(outcome, evidence, setting, title)
    return sections


def _key_figures(outcomes: Sequence[Outcome], found: Sequence[Claim]) -> dict[str, str]:
    figures = {f"claim {claim.number}, {claim.name}": claim.holds.lower() for claim in found}
    cells = sum(outcome.summary["cells"] for outcome in outcomes)
    failed = sum(len(outcome.found["failed"]) for outcome in outcomes)
    figures["models unlearned or trained" + (f", {failed} of them failed" if failed else "")] = str(cells)
    return figures


def _options(config: Mapping[str, Any]) -> dict[str, str]:
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
    facts = run_facts(summary) | {"data": data_text(summary), "cost": cost_text(summary)}
    return {name: value for name, value in facts.items() if value}
