"""From the figures of single runs to means, spreads and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymape.experiments.summaries import spread
from pymape.metrics import METRICS

__all__ = ["aggregate", "paired_differences"]

_FIGURES = (*METRICS, "gap", "seconds")


def aggregate(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a setting and model, over all seeds.

    Args:
        runs: one per setting and seed, with "original", "retrained" and "methods".

    Returns:
        Rows with "setting", "model", "masked" and, for each figure, {"mean", "std", "values"}; std is the sample
        standard deviation, 0 for one seed.
    """
    table: dict[tuple[str, str, bool | None], list[Mapping[str, Any]]] = {}
    for run in runs:
        for name in ("original", "retrained"):
            table.setdefault((run["setting"], name, None), []).append(run[name])
        for method in run["methods"]:
            table.setdefault((run["setting"], method["objective"], method["masked"]), []).append(method)
    rows: list[dict[str, Any]] = []
    for (setting, model, masked), found in table.items():
        figures = {figure: spread([row[figure] for row in found]) for figure in _FIGURES}
        rows.append({"setting": setting, "model": model, "masked": masked, **figures})
        if masked is not None:
            rows[-1]["lrs"] = [row["lr"] for row in found]
    return rows


def paired_differences(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean gap with masks minus mean gap without, seed by seed: negative values are in favour of the masks.

    Args:
        runs: as for `aggregate`, with every objective both masked and unmasked.

    Returns:
        Rows with "setting", "objective", "masked", "unmasked" and "difference", each {"mean", "std", "values"}, and
        "wins", the number of seeds whose difference is negative.
    """
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in runs:
        gaps = {(method["objective"], method["masked"]): method["gap"] for method in run["methods"]}
        for objective in dict.fromkeys(objective for objective, _ in gaps):
            pairs.setdefault((run["setting"], objective), []).append((gaps[objective, True], gaps[objective, False]))
    return [
        {
            "setting": setting,
            "objective": objective,
            "masked": spread([masked for masked, _ in found]),
            "unmasked": spread([unmasked for _, unmasked in found]),
            "difference": spread([masked - unmasked for masked, unmasked in found]),
            "wins": sum(masked < unmasked for masked, unmasked in found),
        }
        for (setting, objective), found in pairs.items()
    ]
