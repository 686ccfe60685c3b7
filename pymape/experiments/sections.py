"""An experiment in sections: the same for its Markdown file and for the page, which adds pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymape.experiments.claims import CRITERION, Claim, at_a_glance, by_objective, claims
from pymape.experiments.summaries import Outcome, pool
from pymape.experiments.tables import SELECTION_RULE, comparison_tables, evidence_tables, markdown, result_table
from pymape.report import Section
from pymape.storage.files import atomic_write

__all__ = [
    "claim_sections",
    "comparison_sections",
    "cost_text",
    "data_text",
    "glance_sections",
    "section_lines",
    "setting_section",
    "write_markdown",
]

_COMPARED = {
    "gap": ("Mean gap, selection against selection", "The figure is the mean gap to the retrained model, in points."),
    "relearning": (
        "Relearning, selection against selection",
        "The figure is the mean distance, in points, of the curve of relearning from the retrained model's.",
    ),
}


def glance_sections(outcomes: Sequence[Outcome]) -> list[Section]:
    """The learned mask against everything in every setting, where an experiment has both, and by objective."""
    table, objectives = at_a_glance(outcomes), by_objective(outcomes)
    tables = [table, objectives] if len(objectives.columns) > 4 else [table]  # of one objective it says nothing new
    return [Section("At a glance", "", tables)] if table.rows else []


def claim_sections(found: Sequence[Claim]) -> list[Section]:
    """How claims are judged, and one section for each that the experiments bear on."""
    sections = [
        Section(
            f"Claim {claim.number}, {claim.name}: {claim.holds.lower()}",
            f"{claim.statement} {claim.verdict}",
            claim.tables,
        )
        for claim in found
    ]
    return [Section("Claims", CRITERION), *sections] if found else []


def setting_section(outcome: Outcome, setting: str) -> Section:
    """What was forgotten, and the figures of every method over the seeds."""
    rows = [row for row in outcome.found["table"] if row["setting"] == setting]
    forgotten = [
        row["forgotten"] for row in outcome.found["chosen"] if row["setting"] == setting and "forgotten" in row
    ]
    seeds = len(outcome.config["seeds"])
    text = f"Forgotten: {'; '.join(dict.fromkeys(forgotten))}. "
    text += f"Mean and standard deviation over {seeds} seeds." if seeds > 1 else "One seed: no spread."
    forget = outcome.config["settings"][setting]["forget"]
    tables = [result_table(rows, outcome.config["task"]["name"], forget), *evidence_tables(rows)]
    return Section(f"Forgetting, {setting}", text, tables)


def comparison_sections(outcomes: Sequence[Outcome]) -> list[Section]:
    """Every selection against the baselines, in the mean gap and, where it was measured, in relearning."""
    sections = []
    for figure, (title, text) in _COMPARED.items():
        pairs, paired = (
            [
                {**row, "setting": f"{outcome.name}: {row['setting']}" if len(outcomes) > 1 else row["setting"]}
                for outcome in outcomes
                for row in outcome.found[figure][kind]
            ]
            for kind in ("pairs", "paired")
        )
        if pairs:
            sections.append(Section(title, text, comparison_tables(pool(pairs), paired)))
    return sections


def data_text(summary: Mapping[str, Any]) -> str:
    """What is to be told about the data, empty where there is nothing."""
    return ", ".join(f"{count} {name}" for name, count in summary.get("data", {}).items())


def cost_text(summary: Mapping[str, Any]) -> str:
    """What an experiment took, in a sentence or two."""
    load, seen = summary["load_average"], summary.get("evidence")
    text = (
        f"{summary['computed']} of {summary['cells']} cells computed in {summary['seconds']:.0f} s by "
        f"{summary['workers']} processes of one thread on {summary['processors']} cores, load average "
        f"{load['start'][0]:.1f} before and {load['end'][0]:.1f} after."
    )
    if seen:
        text += f" Evidence on {seen['computed']} of {seen['models']} models in another {seen['seconds']:.0f} s."
    return text


def section_lines(sections: Sequence[Section]) -> list[str]:
    """Sections in Markdown, without their pictures."""
    lines = []
    for section in sections:
        lines += [f"## {section.title}", *([section.text, ""] if section.text else [])]
        for table in section.tables:
            lines += [*([f"### {table.title}"] if table.title else []), *markdown(table), ""]
            lines += [table.note, ""] if table.note else []
    return lines


def write_markdown(path: Path, outcome: Outcome) -> None:
    """Write an experiment's tables."""
    summary, config, found = outcome.summary, outcome.config, outcome.found
    versions = summary["versions"]
    sections = [
        *claim_sections(claims([outcome])),
        *(setting_section(outcome, setting) for setting in config["settings"]),
        *comparison_sections([outcome]),
    ]
    lines = [f"# {config['title'] or outcome.name}", "", *([config["note"], ""] if config["note"] else [])]
    looks = f", a look after every {config['every']}" if config.get("every") else ""
    lines += [
        f"Command: `{summary['command']}`, commit {summary['commit']}. Seeds {', '.join(map(str, config['seeds']))}; "
        f"{config['steps']} steps of {config['batch_size']} + {config['batch_size']} records{looks}; "
        f"{len(config['lrs'])} values each. torch {versions['torch']}, transformers {versions['transformers']}. "
        f"{cost_text(summary)}" + (f" Data: {data_text(summary)}." if data_text(summary) else ""),
        "",
        SELECTION_RULE,
        "",
    ]
    lines += section_lines(sections)
    lines.append(f"{len(found['failed'])} of {summary['cells']} cells failed.")
    lines += [f"- {reason}" for reason in dict.fromkeys(cell["failed"] for cell in found["failed"])]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
