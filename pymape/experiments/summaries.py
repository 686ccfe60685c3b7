"""From cells to figures: the choice within every grid, gaps to retraining, spreads and paired differences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pymape.metrics.evaluation import METRICS, mean_gap

__all__ = [
    "EVERYWHERE",
    "EVIDENCE",
    "RESULTS",
    "Outcome",
    "bootstrap_interval",
    "choose_cells",
    "compare",
    "group",
    "outcome",
    "pool",
    "read_cells",
    "spread",
    "student_interval",
    "summarise_cells",
]

Cell = Mapping[str, Any]

RESULTS, EVIDENCE = "results.jsonl", "evidence.jsonl"
EVERYWHERE = "all"  # stands for every setting
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Outcome:
    """A finished experiment: what its `summary.json` holds, and what `summarise_cells` gives."""

    summary: Mapping[str, Any]
    found: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.summary["name"]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.summary["config"]


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
    """The cell of every grid with the lowest selection score, with "at_edge"; one that failed where all have."""
    return [_chosen(grid) for grid in group(cells, "setting", "seed", "objective", "selection").values()]


def summarise_cells(cells: Sequence[Cell], baselines: Sequence[str], evidence: Sequence[Cell] = ()) -> dict[str, Any]:
    """Choose within every grid, then hold the chosen models against the retrained ones.

    Args:
        cells: lines of a results file.
        baselines: selections that the others are held against; a pair of two of them is taken once.
        evidence: lines of an evidence file.

    Returns:
        "chosen": one row a setting, seed, objective and selection, and one of each reference model, with "gap" and
        "metrics", the figures of the evidence; "table": the same over the seeds; "gap" and "relearning": `compare`'s
        comparisons of the mean gap and of the relearning distance; "failed": the cells without a model.
    """
    chosen = choose_cells(cells)
    gold = {(row["setting"], row["seed"]): row for row in chosen if row["objective"] == "retrained"}
    seen = {_place(row): row["metrics"] for row in evidence}
    start = {(row["setting"], row["seed"]): row for row in chosen if row["objective"] == "original"}
    for row in chosen:
        place = row["setting"], row["seed"]
        row["models"] = (place[1], *(found.get(place, {}).get(name) for found in (start, gold) for name in METRICS))
        row["gap"] = math.nan if "failed" in row else mean_gap(row, gold[row["setting"], row["seed"]])
        row["metrics"] = seen.get(_place(row), {})
    methods = [row for row in chosen if row["selection"]]
    return {
        "chosen": chosen,
        "table": _table(chosen),
        "gap": compare(methods, baselines, "gap"),
        "relearning": compare(methods, baselines, "relearning_distance"),
        "failed": [cell for cell in cells if "failed" in cell],
    }


def compare(rows: Sequence[Cell], baselines: Sequence[str], figure: str) -> dict[str, Any]:
    """Hold selections against others in one figure, for the same objective, setting and seed.

    Args:
        rows: chosen cells; those without the figure, for instance because a model has failed, have no part.
        baselines: selections that the others are held against; a pair of two of them is taken once.
        figure: name of a figure of the rows or of their "metrics".

    Returns:
        "pairs": with "own", "other" and "difference", own - other; "paired": the same over the seeds; "pooled": see
        `pool`.
    """
    by_place = {_place(row): value for row in rows if (value := _value(row, figure)) is not None}
    models = {(row["setting"], row["seed"]): row.get("models") for row in rows}
    pairs = []
    for position, against in enumerate(baselines):
        for (setting, seed, objective, selection), own in by_place.items():
            other = by_place.get((setting, seed, objective, against))
            if other is not None and selection not in baselines[: position + 1]:
                names = {"setting": setting, "seed": seed, "objective": objective, "selection": selection}
                figures = {"own": own, "other": other, "difference": own - other}
                shared = models[setting, seed] or (setting, seed)
                pairs.append({**names, "against": against, **figures, "models": shared})
    paired = []
    for found in group(pairs, "setting", "objective", "selection", "against").values():
        names = {name: found[0][name] for name in ("setting", "objective", "selection", "against")}
        spreads = {name: spread([pair[name] for pair in found]) for name in ("own", "other", "difference")}
        paired.append({**names, **spreads, **outcome(found)})
    return {"pairs": pairs, "paired": paired, "pooled": pool(pairs)}


def _place(row: Cell) -> tuple[str, int, str, str]:
    return row["setting"], row["seed"], row["objective"], row["selection"]


def _value(row: Cell, figure: str) -> float | None:
    value = row[figure] if figure in row else row["metrics"].get(figure)
    return None if value is None or math.isnan(value) else value


def _chosen(grid: Sequence[Cell]) -> dict[str, Any]:
    """The cell of a grid with the lowest selection score; one that failed where all have."""
    able = [cell for cell in grid if "failed" not in cell]
    if not able:
        return {**grid[0], "value": None, "at_edge": False}
    best = min(able, key=lambda cell: cell.get("selection_score", 0.0))
    return {**best, "at_edge": len(grid) > 1 and best in (grid[0], grid[-1])}


def _table(chosen: Sequence[Cell]) -> list[dict[str, Any]]:
    rows = []
    for (setting, objective, selection), found in group(chosen, "setting", "objective", "selection").items():
        able = [row for row in found if "failed" not in row]
        names = [*METRICS, "gap", "seconds", *(["trained", "peak_cpu_mib"] if selection else [])]
        metrics = dict.fromkeys(name for row in able for name in row["metrics"])
        rows.append(
            {
                "setting": setting,
                "objective": objective,
                "selection": selection,
                "parameter": found[0]["parameter"],
                "values": [row["value"] for row in found],
                "steps": [row.get("steps") for row in found],
                "at_edge": sum(row["at_edge"] for row in found),
                "seeds": len(found),
                **{name: spread([row[name] for row in able]) for name in names},
                "metrics": {name: spread([row["metrics"].get(name) for row in able]) for name in metrics},
            }
        )
    return rows


def pool(pairs: Sequence[Cell]) -> list[dict[str, Any]]:
    """Mean difference over all objectives, settings and seeds, and over those of one setting, with intervals.

    Pairs of one setting and seed share an original and a retrained model, so that they are not independent: the second
    interval takes one mean for each such group. Experiments may share them too, as five requests do with one for all of
    their records: what the two models are is told by their figures.

    Args:
        pairs: "pairs" of `compare`.

    Returns:
        Rows with "selection", "against", "setting" ("all" for every setting), "mean", "interval" and "model_interval"
        (95 %), "models", the number of groups, "pairs", "won", "tied", "lost" and "losses", the pairs that were lost.
    """
    rows = []
    for (selection, against), found in group(pairs, "selection", "against").items():
        settings = dict.fromkeys(pair["setting"] for pair in found)
        for setting in (EVERYWHERE, *(settings if len(settings) > 1 else ())):
            kept = [pair for pair in found if setting in (EVERYWHERE, pair["setting"])]
            groups = group(kept, "models").values()
            means = [statistics.fmean(pair["difference"] for pair in part) for part in groups]
            rows.append(
                {
                    "selection": selection,
                    "against": against,
                    "setting": setting,
                    "mean": statistics.fmean(pair["difference"] for pair in kept),
                    "interval": bootstrap_interval([pair["difference"] for pair in kept]),
                    "model_interval": student_interval(means),
                    "models": len(means),
                    **outcome(kept),
                    "losses": [pair for pair in kept if pair["difference"] > 0],
                }
            )
    return rows


def bootstrap_interval(values: Sequence[float], resamples: int = _RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean.

    Args:
        values: at least one.
        resamples: number of draws, from a fixed seed.
    """
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.array(values)[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t distribution, which few values need: a bootstrap of three spans no more
    than the three, however close they lie.

    Args:
        values: at least one; of one alone nothing is known.
    """
    if len(values) == 1:
        return -math.inf, math.inf
    from scipy.stats import t as student

    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def outcome(pairs: Sequence[Cell]) -> dict[str, int]:
    """Numbers of "pairs", and of those where the selection has less ("won"), the same ("tied") or more ("lost")."""
    signs = [np.sign(pair["difference"]) for pair in pairs]
    return {"pairs": len(pairs), "won": signs.count(-1), "tied": signs.count(0), "lost": signs.count(1)}


def group(rows: Sequence[Cell], *names: str) -> dict[tuple[Any, ...], list[Any]]:
    """Rows that agree in the named columns, in order."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation of the values that are not None; None where there is none."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else 0.0,
        "values": list(values),
    }
