"""What an unlearning run tells its reader: the table on the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymape.metrics import METRICS, Predictions
from pymape.report import Report, Row, Section, Table, aligned, evidence_section, flat_settings, run_facts, write_report

if TYPE_CHECKING:
    from pymape.masks import ModuleMasks

__all__ = ["summary_text", "write_page"]

_TITLES = {"gap": "mean gap", "forget_loss": "forget loss", "retain_loss": "retain loss", "test_loss": "test loss"}


def summary_text(summary: Mapping[str, Any]) -> str:
    """The table of a finished run as plain text."""
    columns, rows = _table(summary)
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in summary["seconds"].items())
    seconds += f"; stopped early: {summary['stopped']}" if summary["stopped"] else ""
    written = "the unlearned model, summary.json, report.html" + (" and masks.safetensors" if summary["masks"] else "")
    return "\n".join([*aligned([columns, *rows]), "", seconds, f"Wrote {written} to {summary['config']['output']}."])


def write_page(
    path: Path, summary: Mapping[str, Any], masks: ModuleMasks | None, models: Mapping[str, Mapping[str, Predictions]]
) -> None:
    """Write the HTML report of an unlearning run.

    Args:
        path: the file to write.
        summary: what `summary.json` holds.
        masks: the masks in use; None where all parameters were trained.
        models: predictions by model and set.
    """
    config, records = summary["config"], summary["records"]
    figures = summary["models"]
    columns, rows = _table(summary)
    kinds = {"unlearned": ""}
    language = summary["task"].startswith("causal")
    measure = "the share of tokens predicted right" if language else "the accuracy"
    note = (
        f"UA: 100 - {measure} on the forget set. RA, TA: {measure} on the retain and on the test set. MIA: share of "
        "the forget set that a membership attack calls never seen. In percent; losses in nats."
    )
    if "retrained" in figures:
        note += " Mean gap: mean distance to the retrained model over these; the smaller, the closer."
    elif "test" not in records:
        note += " Without a test set there is no TA and no attack."
    share = 1.0 if masks is None else masks.cost()
    trained = "all parameters" if masks is None else f"the selected heads and filters ({share:.1%} of their parameters)"
    tiles = {
        "records forgotten": f"{records['forget']}",
        "UA before and after": f"{figures['original']['UA']:.1f} → {figures['unlearned']['UA']:.1f}",
        "RA before and after": f"{figures['original']['RA']:.1f} → {figures['unlearned']['RA']:.1f}",
    }
    if "gap" in figures["unlearned"]:
        tiles["mean gap to retraining"] = f"{figures['unlearned']['gap']:.1f}"
    seconds = [Row([phase, f"{value:.1f}"]) for phase, value in summary["seconds"].items()]
    memory = f"Peak memory of the whole run: {summary['peak_memory_mib']:.0f} MiB."
    report = Report(
        title="Unlearning report",
        lead=(
            f"{records['forget']} of {records['forget'] + records['retain']} records of {config['data']['path']} were "
            f"forgotten by {config['model']} ({summary['task']}) with the objective {config['objective']} on {trained}."
        ),
        key_figures=tiles,
        sections=[
            Section(
                "Result", tables=[Table(columns, [Row(row, kinds.get(row[0], "reference")) for row in rows], note=note)]
            ),
            evidence_section("A closer look", "", masks, models),
            Section("Cost", memory, tables=[Table(("phase", "time (s)"), seconds)]),
        ],
        settings=_method(summary) | flat_settings(config),
        command=summary["command"],
        facts=run_facts(summary) | {"data": f"sha256 {summary['data_fingerprint']}"},
    )
    write_report(path, report)


def _table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    models = summary["models"]
    names = [name for name in (*METRICS, *_TITLES) if any(name in row for row in models.values())]
    columns = ["model", *(_TITLES.get(name, name) for name in names)]
    digits = {name: 3 if name.endswith("loss") else 1 for name in names}
    rows = [[model, *(f"{row[name]:.{digits[name]}f}" for name in names)] for model, row in models.items()]
    return columns, rows


def _method(summary: Mapping[str, Any]) -> dict[str, str]:
    masks = summary["masks"]
    if not masks or masks.get("objective_before") is None:
        return {}
    before, after = masks["objective_before"], masks["objective_after"]
    return {"mask search": f"J {before:.4g} after the warm start, {after:.4g} after {masks['swaps']} swaps"}
