"""From cells to tables: the choice within every grid, gaps to retraining, spreads and paired differences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pymape.files import atomic_write
from pymape.metrics.evaluation import METRICS, mean_gap

__all__ = [
    "EVERYWHERE",
    "EVIDENCE",
    "LOST_COLUMNS",
    "PAIRED_COLUMNS",
    "POOLED_COLUMNS",
    "RESULTS",
    "RESULT_COLUMNS",
    "SELECTION_RULE",
    "bootstrap_interval",
    "choose_cells",
    "lost_pairs",
    "paired_cells",
    "pool",
    "pooled_cells",
    "read_cells",
    "result_cells",
    "summarise_cells",
    "write_markdown",
]

Cell = Mapping[str, Any]

RESULT_COLUMNS = (
    "objective", "trained", *METRICS, "mean gap", "values trained", "time (s)", "peak (MiB)", "value", "at edge",
)  # fmt: skip
PAIRED_COLUMNS = ("setting", "objective", "selection", "against", "its gap", "the other's", "difference", "closer")
POOLED_COLUMNS = (
    "selection", "against", "setting", "pairs", "difference", "95 % over pairs", "95 % over models",
    "won", "tied", "lost",
)  # fmt: skip
LOST_COLUMNS = ("selection", "against", "setting", "objective", "seed", "its gap", "the other's", "difference")
SELECTION_RULE = (
    "Every method tries as many values of its one tuned parameter (the learning rate; for one-shot objectives their "
    "own parameter). One rule chooses for all: minimise |A_forget - target| + |A_retain - A_retain(original)| + "
    "|A_val - A_val(original)|, target 0 for a class and the original's validation accuracy for random records; the "
    "first of equals wins. Neither the test records nor the retrained model have a part in it."
)

RESULTS, EVIDENCE = "results.jsonl", "evidence.jsonl"
_RESAMPLES = 10_000
EVERYWHERE = "all"  # stands for every setting


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file.

    Raises:
        ValueError: a file that is missing or damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"run must hold an intact {path.name}, got {str(path)!r}: {error}") from error


def choose_cells(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The cell of every grid that `SELECTION_RULE` chooses, with "at_edge"; one that failed where all have."""
    return [_chosen(grid) for grid in _groups(cells, "setting", "seed", "objective", "selection").values()]


def summarise_cells(cells: Sequence[Cell], baselines: Sequence[str]) -> dict[str, Any]:
    """Choose within every grid, then hold the chosen models against the retrained ones.

    Args:
        cells: lines of a results file.
        baselines: selections that the others are held against; a pair of two of them is taken once.

    Returns:
        "chosen": one row a setting, seed, objective and selection, and one of each reference model, with "gap";
        "table": the same over the seeds; "pairs": two selections of one objective, setting and seed; "paired": their
        differences of gaps over the seeds; "pooled": over everything; "failed": the cells without a model.
    """
    chosen = choose_cells(cells)
    gold = {(row["setting"], row["seed"]): row for row in chosen if row["objective"] == "retrained"}
    for row in chosen:
        row["gap"] = math.nan if "failed" in row else mean_gap(row, gold[row["setting"], row["seed"]])
    pairs = _pairs([row for row in chosen if row["selection"]], baselines)
    paired = []
    for (setting, objective, selection, against), found in _groups(
        pairs, "setting", "objective", "selection", "against"
    ).items():
        figures = {name: _spread([pair[name] for pair in found]) for name in ("own", "other", "difference")}
        names = {"setting": setting, "objective": objective, "selection": selection, "against": against}
        paired.append({**names, **figures, **_outcome(found)})
    return {
        "chosen": chosen,
        "table": _table(chosen),
        "pairs": pairs,
        "paired": paired,
        "pooled": pool(pairs),
        "failed": [cell for cell in cells if "failed" in cell],
    }


def write_markdown(path: Path, summary: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Write an experiment's tables.

    Args:
        path: the file.
        summary: what `summary.json` holds.
        found: what `summarise_cells` gives.
    """
    config = summary["config"]
    lines = [f"# {config['title'] or summary['name']}", "", config["note"], ""] if config["note"] else []
    lines = lines or [f"# {config['title'] or summary['name']}", ""]
    lines += [_method_text(summary), ""]
    for setting in config["settings"]:
        rows = [row for row in found["table"] if row["setting"] == setting]
        forgotten = next(
            row["forgotten"] for row in found["chosen"] if row.get("forgotten") and row["setting"] == setting
        )
        lines += [f"## {setting}", f"For instance {forgotten}. Mean ± standard deviation over the seeds.", ""]
        lines += [*_markdown(RESULT_COLUMNS, [result_cells(row) for row in rows], 2), ""]
    if found["paired"]:
        lines += [
            "## Mean gap against other selections",
            "Negative differences: the selection is closer to retraining.",
        ]
        lines += ["", *_markdown(POOLED_COLUMNS, [pooled_cells(row) for row in found["pooled"]], 3)]
        lines += ["", *_markdown(PAIRED_COLUMNS, [paired_cells(row) for row in found["paired"]], 4)]
        lost = lost_pairs(found["pooled"])
        lines += ["", "Every lost pair:" if lost else "No pair was lost.", ""]
        lines += [*_markdown(LOST_COLUMNS, lost, 4), ""] if lost else []
    lines.append(f"{len(found['failed'])} of {summary['cells']} cells failed.")
    lines += [f"- {reason}" for reason in dict.fromkeys(cell["failed"] for cell in found["failed"])]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def result_cells(row: Mapping[str, Any]) -> list[str]:
    """One line of the results: `RESULT_COLUMNS`."""
    reference = not row["selection"]
    values = sorted({value for value in row["values"] if value is not None})
    ends = [f"{value:g}" for value in dict.fromkeys(values[:1] + values[-1:])]
    name = "" if row["parameter"] == "lr" else f"{row['parameter']} "
    figures = [_figure(row[metric]) for metric in (*METRICS, "gap")]
    blank = reference or row["gap"]["mean"] is None
    share = "" if blank else f"{100 * row['trained']['mean']:.1f} %"
    peak = "" if blank else f"{row['peak_cpu_mib']['mean']:.0f}"
    chosen = "" if reference else name + " to ".join(ends)
    edge = "" if reference else f"{row['at_edge']} of {row['seeds']}"
    return [row["objective"], row["selection"], *figures, share, _figure(row["seconds"]), peak, chosen, edge]


def paired_cells(row: Mapping[str, Any]) -> list[str]:
    """One line of the differences: `PAIRED_COLUMNS`."""
    names = [row[name] for name in ("setting", "objective", "selection", "against")]
    figures = [_figure(row["own"], 2), _figure(row["other"], 2), _figure(row["difference"], 2, signed=True)]
    return [*names, *figures, f"{row['won']} of {row['pairs']}"]


def pooled_cells(row: Mapping[str, Any]) -> list[str]:
    """One line of the pooled differences: `POOLED_COLUMNS`."""
    names = [row[name] for name in ("selection", "against", "setting")]
    intervals = [f"[{low:+.2f}, {high:+.2f}]" for low, high in (row["interval"], row["model_interval"])]
    share = f"{row['won']} ({row['won'] / row['pairs']:.0%})"
    return [*names, str(row["pairs"]), f"{row['mean']:+.2f}", *intervals, share, str(row["tied"]), str(row["lost"])]


def lost_pairs(pooled: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Every pair that a selection lost: `LOST_COLUMNS`."""
    return [
        [
            *(str(pair[name]) for name in ("selection", "against", "setting", "objective", "seed")),
            f"{pair['own']:.2f}", f"{pair['other']:.2f}", f"{pair['difference']:+.2f}",
        ]
        for row in pooled
        if row["setting"] == EVERYWHERE
        for pair in row["losses"]
    ]  # fmt: skip


def _method_text(summary: Mapping[str, Any]) -> str:
    config, versions, load = summary["config"], summary["versions"], summary["load_average"]
    return (
        f"Command: `{summary['command']}`, commit {summary['commit']}. Seeds {', '.join(map(str, config['seeds']))}; "
        f"{config['steps']} steps of {config['batch_size']} + {config['batch_size']} records; "
        f"{len(config['lrs'])} values each. torch {versions['torch']}, transformers {versions['transformers']}. "
        f"{summary['computed']} of {summary['cells']} cells computed in {summary['seconds']:.0f} s by "
        f"{summary['workers']} processes of one thread on {summary['processors']} cores, load average "
        f"{load['start'][0]:.1f} before and {load['end'][0]:.1f} after.\n\n{SELECTION_RULE}\n\n"
        "UA = 100 - accuracy on the forget set, RA and TA = accuracy on the retain and test set, MIA = share of the "
        "forget set that a membership attack calls unseen, mean gap = mean distance of the four to the retrained "
        "model's. Values trained: share of all of the model's parameters. Time and peak memory (of the whole process) "
        "are the chosen run's. At edge: seeds where the choice is the first or last value of its grid."
    )


def _chosen(grid: Sequence[Cell]) -> dict[str, Any]:
    """The cell of a grid with the lowest selection score; one that failed where all have."""
    able = [cell for cell in grid if "failed" not in cell]
    if not able:
        return {**grid[0], "value": None, "at_edge": False}
    best = min(able, key=lambda cell: cell.get("selection_score", 0.0))
    return {**best, "at_edge": len(grid) > 1 and best in (grid[0], grid[-1])}


def _table(chosen: Sequence[Cell]) -> list[dict[str, Any]]:
    rows = []
    for (setting, objective, selection), found in _groups(chosen, "setting", "objective", "selection").items():
        able = [row for row in found if "failed" not in row]
        names = [*METRICS, "gap", "seconds", *(["trained", "peak_cpu_mib"] if selection else [])]
        rows.append(
            {
                "setting": setting,
                "objective": objective,
                "selection": selection,
                "parameter": found[0]["parameter"],
                "values": [row["value"] for row in found],
                "at_edge": sum(row["at_edge"] for row in found),
                "seeds": len(found),
                **{name: _spread([row[name] for row in able]) for name in names},
            }
        )
    return rows


def _pairs(chosen: Sequence[Cell], baselines: Sequence[str]) -> list[dict[str, Any]]:
    """Two selections of one objective, setting and seed; a pair with a failed side is left out."""
    by_place = {(row["setting"], row["seed"], row["objective"], row["selection"]): row for row in chosen}
    pairs = []
    for position, against in enumerate(baselines):
        for (setting, seed, objective, selection), row in by_place.items():
            other = by_place.get((setting, seed, objective, against))
            if other is None or selection in baselines[: position + 1] or math.isnan(row["gap"] + other["gap"]):
                continue
            place = {"setting": setting, "seed": seed, "objective": objective}
            difference = row["gap"] - other["gap"]
            gaps = {"own": row["gap"], "other": other["gap"], "difference": difference}
            pairs.append({**place, "selection": selection, "against": against, **gaps})
    return pairs


def pool(pairs: Sequence[Cell]) -> list[dict[str, Any]]:
    """Mean difference over all objectives, settings and seeds, and over those of one setting, with intervals.

    Pairs of one setting and seed share an original and a retrained model, so that they are not independent: the second
    interval draws such groups as a whole.

    Args:
        pairs: "pairs" of `summarise_cells`.

    Returns:
        Rows with "selection", "against", "setting" ("all" for every setting), "mean", "interval" and "model_interval"
        (95 %), "pairs", "won", "tied", "lost" and "losses", the pairs that were lost.
    """
    rows = []
    for (selection, against), found in _groups(pairs, "selection", "against").items():
        settings = dict.fromkeys(pair["setting"] for pair in found)
        for setting in (EVERYWHERE, *(settings if len(settings) > 1 else ())):
            kept = [pair for pair in found if setting in (EVERYWHERE, pair["setting"])]
            groups = [[pair["difference"] for pair in group] for group in _groups(kept, "setting", "seed").values()]
            rows.append(
                {
                    "selection": selection,
                    "against": against,
                    "setting": setting,
                    "mean": statistics.fmean(pair["difference"] for pair in kept),
                    "interval": bootstrap_interval([[pair["difference"]] for pair in kept]),
                    "model_interval": bootstrap_interval(groups),
                    **_outcome(kept),
                    "losses": [pair for pair in kept if pair["difference"] > 0],
                }
            )
    return rows


def bootstrap_interval(groups: Sequence[Sequence[float]], resamples: int = _RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean of all values, drawing whole groups with replacement.

    Args:
        groups: values; those of one group are drawn together.
        resamples: number of draws, from a fixed seed.
    """
    sums, sizes = np.array([sum(group) for group in groups]), np.array([len(group) for group in groups])
    drawn = np.random.default_rng(0).integers(len(groups), size=(resamples, len(groups)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _outcome(pairs: Sequence[Cell]) -> dict[str, int]:
    signs = [np.sign(pair["difference"]) for pair in pairs]
    return {"pairs": len(pairs), "won": signs.count(-1), "tied": signs.count(0), "lost": signs.count(1)}


def _groups(rows: Sequence[Cell], *names: str) -> dict[tuple[Any, ...], list[Any]]:
    found: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation; None where there is no value."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": list(values),
    }


def _figure(spread: Mapping[str, Any], digits: int = 1, *, signed: bool = False) -> str:
    if spread["mean"] is None:
        return "failed"
    mean = f"{spread['mean']:{'+' if signed else ''}.{digits}f}"
    return mean if len(spread["values"]) == 1 else f"{mean} ± {spread['std']:.{digits}f}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> list[str]:
    """A table whose first `labels` columns are text."""
    rule = ["---"] * labels + ["---:"] * (len(columns) - labels)
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]
