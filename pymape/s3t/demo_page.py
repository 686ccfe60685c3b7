"""What the S3T demo tells its reader: a table on the terminal and the report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pymape.report import Figure, Report, Row, Section, Table, aligned, flat_settings, run_facts, write_report

__all__ = ["demo_text", "write_demo_page"]

_COLUMNS = ("method", "stages", "stored", "accuracy", "after half", "after all", "first shard dead after")
_NOTE = (
    "Stored: all stage files, or all of SISA's checkpoints. Accuracy: of the ensemble of live shards on the test part, "
    "in percent, before the first request, after half of them and after all. Every method meets the same requests."
)


def demo_text(summary: Mapping[str, Any]) -> str:
    """The result of a finished demo as plain text."""
    records, config = summary["records"], summary["config"]
    lines = [
        f"{records['private']} private digits in {config['shards']} shards of {config['slices']} slices, "
        f"{_requests(summary)} requests to delete one each; base trained on {records['public']} other digits",
        "",
        *aligned([_COLUMNS, *(_cells(name, run) for name, run in summary["runs"].items())]),
        "",
        *(_verified(name, run) for name, run in _systems(summary).items()),
        f"Wrote report.html, summary.json and the systems to {config['output']} in {summary['seconds']:.0f} s.",
    ]
    return "\n".join(lines)


def write_demo_page(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the demo's HTML report.

    Args:
        path: the file to write.
        summary: what `summary.json` holds.
    """
    records, config = summary["records"], summary["config"]
    first = next(iter(_systems(summary).values()))
    report = Report(
        title="Deleting digits exactly",
        lead=(
            f"{records['private']} private images were learned as LoRA adapters on a small Vision Transformer, in "
            f"{config['shards']} shards of {config['slices']} slices. Then {_requests(summary)} requests deleted one "
            "image each. A deletion trains nothing: it switches off and erases every stage that has seen the image. "
            "What is left is, bit for bit, what training without it gives."
        ),
        key_figures={
            "requests until a shard died: S3T / SISA": " / ".join(
                _death(summary["runs"][name]) for name in (next(iter(_systems(summary))), "SISA")
            ),
            "accuracy before / after all requests": f"{_accuracy(first, 0)} / {_accuracy(first, -1)}",
            "milliseconds until a request is durable (median)": (
                f"{1000 * statistics.median(first['acknowledged_seconds']):.1f}"
            ),
            "seconds in all": f"{summary['seconds']:.0f}",
        },
        sections=[_result(summary), _course(summary), *(_log(name, run) for name, run in _systems(summary).items())],
        settings=flat_settings(config),
        command=summary["command"],
        facts=run_facts(summary),
    )
    write_report(path, report)


def _result(summary: Mapping[str, Any]) -> Section:
    rows = [Row(_cells(name, run), "reference" if name == "SISA" else "") for name, run in summary["runs"].items()]
    text = " ".join(_verified(name, run) for name, run in _systems(summary).items())
    return Section("Result", text, tables=[Table(_COLUMNS, rows, note=_NOTE)])


def _course(summary: Mapping[str, Any]) -> Section:
    title = "Request by request"
    if find_spec("matplotlib") is None:
        return Section(title, "The pictures need matplotlib: pip install matplotlib.")
    from pymape.report.plots import lines

    runs = summary["runs"].items()
    panels = {
        "accuracy (%)": {name: [step["accuracy"] for step in run["steps"]] for name, run in runs},
        "share of the slices that act (%)": {
            name: [100 * statistics.fmean(step["depths"]) / run["slices"] for step in run["steps"]]
            for name, run in runs
        },
        "requests expected until the next shard dies": {
            name: [step["remaining"] for step in run["steps"]] for name, run in runs
        },
    }
    caption = (
        "After each request: accuracy of the ensemble (left), share of the shards' slices that still act (middle), and "
        "how many more requests are expected until the next shard is dead (right), from the system's own ledger."
    )
    return Section(title, figures=[Figure(lines(panels, "requests", steps=True), caption)])


def _log(name: str, run: Mapping[str, Any]) -> Section:
    """What every request that changed something did to one system."""
    rows = [Row(_log_cells(0, run["steps"][0]), "reference")]
    for number, (before, after) in enumerate(zip(run["steps"], run["steps"][1:], strict=False), start=1):
        if after["serving"] != before["serving"]:
            rows.append(Row(_log_cells(number, after)))
    shards = [f"shard {shard}" for shard in range(len(run["steps"][0]["depths"]))]
    note = (
        "Slices in the order in which the served stages took them up; none of them has lost a record. Requests into "
        "slices that were switched off already change nothing and are left out."
    )
    columns = ("request", *shards, "accuracy", "expected until the next dies")
    return Section(f"What {name} served", tables=[Table(columns, rows, labels=1 + len(shards), note=note)])


def _log_cells(number: int, step: Mapping[str, Any]) -> list[str]:
    serving = [" ".join(map(str, prefix)) or "dead" for prefix in step["serving"]]
    return [str(number), *serving, _percent(step["accuracy"]), _number(step["remaining"])]


def _cells(name: str, run: Mapping[str, Any]) -> list[str]:
    steps = run["steps"]
    accuracies = [_accuracy(run, place) for place in (0, len(steps) // 2, -1)]
    return [name, str(run["stages"]), f"{run['bytes'] / 1e6:.2f} MB", *accuracies, _death(run)]


def _death(run: Mapping[str, Any]) -> str:
    """Number of requests after which a shard was dead."""
    steps = run["steps"]
    dead = next((number for number, step in enumerate(steps) if min(step["depths"]) == 0), None)
    return f"> {len(steps) - 1}" if dead is None else str(dead)


def _verified(name: str, run: Mapping[str, Any]) -> str:
    return f"{name}: verified; stage {run['verified']['replayed']} trained again gave the same bits."


def _systems(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: run for name, run in summary["runs"].items() if name != "SISA"}


def _requests(summary: Mapping[str, Any]) -> int:
    return max(len(run["steps"]) for run in summary["runs"].values()) - 1


def _accuracy(run: Mapping[str, Any], place: int) -> str:
    return _percent(run["steps"][place]["accuracy"])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
