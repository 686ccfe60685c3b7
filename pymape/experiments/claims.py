"""What experiments say about the project's claims, each with its figures and whether its written criterion is met."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pymape.experiments.summaries import EVERYWHERE, Outcome, bootstrap_interval, compare, group
from pymape.experiments.tables import MEMORY, interval_text, share_text
from pymape.report import Row, Table

__all__ = ["CRITERION", "Claim", "at_a_glance", "by_objective", "claims", "learned_selection", "mean_gaps"]

CRITERION = (
    "A claim holds where both 95 % intervals of the mean difference lie below 0: the bootstrap over pairs, and "
    "Student's t over groups of pairs that share an original and a retrained model (one setting and seed), of which "
    "there are at least three, each of one weight; claim 1 also asks for 80 % of the pairs won. It is not shown where "
    "nothing is missing but that an interval contains 0. A pair of which one side has failed is left out."
)
_LEAST_MODELS = 3
_LEAST_WON = 0.8
_COLUMNS = (
    "figure", "setting", "pairs", "with", "without", "difference", "95 % over pairs", "95 % over models",
    "smaller in", "criterion",
)  # fmt: skip
_SEARCH_COLUMNS = (
    "setting", "selection", "searches", "J, warm start", "J, greedy", "rise of J", "95 %", "higher in", "exchanges",
)  # fmt: skip
_GAPS = ("nothing done", "everything", "masks", "retrained again")
_GLANCE_COLUMNS = (
    "task: forgotten", "pairs", *_GAPS, "masks closer in", "time", "with the search", "memory",
)  # fmt: skip
_GLANCE = (
    "Nothing done, everything, masks, retrained again: mean gap to the retrained model, in points, of the original, of "
    "models with all parameters or with a learned mask's trained, and of a second retrained model, which is what "
    "chance alone makes. Pairs: of two models of one seed and objective. Time, with the search, memory: what "
    "unlearning takes with masks of what it takes on everything; the time without finding the masks and with it, both "
    "of runs that may differ in steps, as the rule chooses these too; the memory that unlearning adds, or the peak of "
    "the process where that was not measured. Failed: pairs left out, of which a model failed or the search left no "
    "mask."
)
_BY_OBJECTIVE = "Mean gap to the retrained model, in points, with everything trained / with a learned mask."
_J = (
    "J: what the search maximises, an estimate of how much the forget loss would rise without the selected modules, "
    "less the weighted rise of the retain loss; in shares of each layer's influence where the search normalises. "
    "Exchanges: of a selected for another module, mean over the searches. The claim holds in J where no search ends "
    "lower and 80 % end higher."
)
_WITH, _WITHOUT = "with", "without"  # the sides of a comparison
_YES, _NO, _OPEN, _UNKNOWN = "Holds", "Does not hold", "Not shown", "Cannot be judged"
_UNLEARNING, _WHOLE = "time of unlearning", "time with finding the mask"

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A claim in a few words and in full, whether it holds in a word and in a sentence, and the figures for that."""

    number: int
    name: str
    statement: str
    holds: str
    verdict: str
    tables: Sequence[Table]


def learned_selection(config: Mapping[str, Any]) -> str | None:
    """Name of the first selection whose masks are learned: the one that the claims are about."""
    for name, selection in config["selections"].items():
        chosen = selection["kind"] == "modules" and selection["objective"] not in ("random", "magnitude")
        if chosen or selection["kind"] == "gates":
            return name
    return None


def claims(outcomes: Sequence[Outcome]) -> list[Claim]:
    """The claims that experiments bear on, judged over all of them together."""
    several = len(outcomes) > 1
    rows = [row for outcome in outcomes for row in _mask_or_not(outcome, several)]
    found = [_claim_1(rows, outcomes), _claim_2(rows, outcomes), _claim_3(outcomes, several), _claim_5(rows)]
    return [claim for claim in found if claim is not None]


def mean_gaps(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Of every setting the mean gap of the original, of both sides, and of a second retrained model, where it has one.

    Returns:
        Name of a setting -> {"nothing done", "everything", "masks", "retrained again": points}.
    """
    return {name: gaps for name, gaps, _, _ in _glances(outcomes)}


def at_a_glance(outcomes: Sequence[Outcome]) -> Table:
    """One line for every setting: the learned mask against all parameters, beside what chance makes."""
    lines = []
    for name, gaps, pooled, rows in _glances(outcomes):
        pairs, *costs = _glance_cells(pooled, rows)
        lines.append(Row([name, pairs, *(_points(gaps, what) for what in _GAPS), *costs]))
    return Table(_GLANCE_COLUMNS, lines, note=_GLANCE)


def by_objective(outcomes: Sequence[Outcome]) -> Table:
    """One line for every setting, and beside what chance makes both sides of every objective: "everything / masks"."""
    glances = _glances(outcomes)
    objectives = list(dict.fromkeys(row["objective"] for *_, rows in glances for row in rows))
    lines = []
    for name, gaps, _, rows in glances:
        found = [_pooled([row for row in rows if row["objective"] == one], "gap") for one in objectives]
        means = [f"{gap[0]['other']:.2f} / {gap[0]['own']:.2f}" if gap else "" for gap in found]
        lines.append(Row([name, _points(gaps, _GAPS[0]), *means, _points(gaps, _GAPS[-1])]))
    columns = ("task: forgotten", _GAPS[0], *objectives, _GAPS[-1])
    return Table(columns, lines, title="By objective", note=_BY_OBJECTIVE)


def _glances(outcomes: Sequence[Outcome]) -> Sequence[tuple[str, dict[str, float], Cell, Sequence[Cell]]]:
    """Of every setting that has both sides: name, mean gaps, the gaps of both sides pooled, and the chosen models."""
    found, several = [], len(outcomes) > 1
    for outcome in outcomes:
        models = _mask_or_not(outcome, several)
        for setting in outcome.config["settings"]:
            name = _name(outcome, setting, several)
            rows = [row for row in models if row["setting"] == name]
            if pooled := _pooled(rows, "gap"):
                before, again = (_gaps(outcome, reference, setting) for reference in ("original", "retrained again"))
                own = (before, [pooled[0]["other"]], [pooled[0]["own"]], again)
                gaps = {what: statistics.fmean(values) for what, values in zip(_GAPS, own, strict=True) if values}
                found.append((name, gaps, pooled[0], rows))
    return found


def _points(gaps: Mapping[str, float], what: str) -> str:
    return f"{gaps[what]:.2f}" if what in gaps else ""


def _glance_cells(gap: Cell, rows: Sequence[Cell]) -> list[str]:
    """Of one setting the number of pairs, of those that the masks win, and what they cost of what everything does."""
    title, memory = _memory(rows)
    costs = [_pooled(rows, "seconds"), _pooled(rows, "total_seconds"), memory]
    parts = [f"{pooled[0]['own'] / pooled[0]['other']:.2f} x" for pooled in costs]
    parts[-1] += " (peak)" if title == MEMORY["peak_cpu_mib"] else ""
    failed = _failed(rows, gap)
    won = f"{gap['won']} of {gap['pairs']}" + (f" ({failed} failed)" if failed else "")
    return [str(gap["pairs"]), won, *parts]


def _claim_1(rows: Sequence[Cell], outcomes: Sequence[Outcome]) -> Claim | None:
    pooled = _pooled(rows, "gap")
    if not pooled:
        return None
    chosen = [(outcome.config["selections"], learned_selection(outcome.config)) for outcome in outcomes]
    budgets = sorted({selections[name]["budget"] for selections, name in chosen if name is not None})
    failed = _failed(rows, pooled[0])
    return Claim(
        1,
        "closer to retraining",
        f"At a budget of {' and '.join(map(share_text, budgets))} of the parameters, a learned mask brings the same "
        "objective closer to retraining than training all parameters.",
        _judge(pooled[0], _LEAST_WON)[0],
        _verdict("the mean gap", "points", pooled, _LEAST_WON)
        + (f" {failed} pairs are left out: a model of theirs failed." if failed else "")
        + _chance(outcomes),
        [_table({"mean gap (points)": pooled}, _LEAST_WON)],
    )


def _failed(rows: Sequence[Cell], pooled: Cell) -> int:
    """Pairs that are left out of a pooled figure: a model of theirs failed."""
    return sum(len(pair) > 1 for pair in group(rows, "setting", "seed", "objective").values()) - pooled["pairs"]


def _chance(outcomes: Sequence[Outcome]) -> str:
    """What separates two retrained models, where there are two."""
    gaps = [gap for outcome in outcomes for gap in _gaps(outcome, "retrained again")]
    return f" Two retrained models are {statistics.fmean(gaps):.2f} points from each other." if gaps else ""


def _gaps(outcome: Outcome, reference: str, setting: str = EVERYWHERE) -> list[float]:
    """Of the models of a kind that no method made."""
    rows = [row for row in outcome.found["chosen"] if row["objective"] == reference]
    return [row["gap"] for row in rows if setting in (EVERYWHERE, row["setting"])]


def _claim_2(rows: Sequence[Cell], outcomes: Sequence[Outcome]) -> Claim | None:
    """The halves of the claim, as far as the experiments bear on them."""
    successive = _pooled([row for row in rows if row["requests"] > 1], "gap")
    curves = _pooled(rows, "relearning_distance")
    parts = {
        "After several requests": ("mean gap (points)", "the mean gap", successive),
        "In relearning": ("distance of the curves (points)", "the mean distance of the curves", curves),
    }
    found = {name: part for name, part in parts.items() if part[-1]}
    if not found:
        return None
    verdicts = [f"{name}: {_verdict(what, 'points', pooled)}" for name, (_, what, pooled) in found.items()]
    if not successive:
        verdicts.append("The other half of the claim, successive requests, is no part of this.")
    return Claim(
        2,
        "successive requests and relearning",
        "With a learned mask the model stays closer to the retrained one over successive requests, and its relearning "
        "curve is closer to the retrained model's.",
        _all([_judge(pooled[0])[0] for *_, pooled in found.values()]),
        " ".join(verdicts) + (_chance(outcomes) if successive else ""),
        [_table({title: pooled for title, _, pooled in found.values()})],
    )


def _claim_3(outcomes: Sequence[Outcome], several: bool) -> Claim | None:
    """J is known of every greedy search, the mean gap where another selection differs in nothing but the search."""
    rows: list[dict[str, Any]] = []
    searches: list[Cell] = []
    lines = []
    for outcome in outcomes:
        name, warm = _greedy_and_warm(outcome.config)
        models = _models(outcome, several)
        searched = [row for row in models if row["selection"] == name and "objective_before" in row]
        for setting, found in group(searched, "setting").items():
            once = [of_seed[0] for of_seed in group(found, "seed").values()]  # all objectives have the same masks
            lines.append(Row([*setting, str(name), *_search_cells(once)]))
            searches += once
        sides = {name: _WITH, warm: _WITHOUT}
        rows += [{**row, "selection": sides[row["selection"]]} for row in models if row["selection"] in sides]
    if not searches:
        return None
    rises = [_rise(row) for row in searches]
    rose = min(rises) >= 0 and sum(rise > 0 for rise in rises) >= _LEAST_WON * len(rises)
    words = [_UNKNOWN if len(rises) < _LEAST_MODELS else _YES if rose else _NO]
    verdict = (
        f"In J: {words[0].lower()}; J ends higher than it began in {sum(rise > 0 for rise in rises)} of {len(rises)} "
        f"searches, and lower in {sum(rise < 0 for rise in rises)}."
    )
    tables, pooled = [Table(_SEARCH_COLUMNS, lines, labels=2, note=_J)], _pooled(rows, "gap")
    if pooled:
        words.append(_judge(pooled[0])[0])
        verdict += f" In mean gap: {_verdict('the gap', 'points', pooled)}"
        tables.append(_table({"mean gap (points)": pooled}))
    else:
        words.append(_UNKNOWN)
        verdict += " No selection stops at the warm start, so that there are no mean gaps to compare."
    return Claim(
        3,
        "the greedy search",
        "The greedy search beats its own warm start in J, and in mean gap on average.",
        _all(words),
        verdict,
        tables,
    )


def _claim_5(rows: Sequence[Cell]) -> Claim | None:
    gaps = _pooled(rows, "gap")
    if not gaps:
        return None
    whole = _pooled(rows, "total_seconds")
    memory, used = _memory(rows)
    worse = gaps[0]["models"] >= _LEAST_MODELS and gaps[0]["model_interval"][0] > 0
    verdict = (
        f"In time: {_verdict(f'the {_WHOLE}', 's', whole)} In memory: {_verdict(f'the {memory}', 'MiB', used)} The "
        f"mean gap is {'' if worse else 'not clearly '}larger: {gaps[0]['mean']:+.2f} points, interval over models "
        f"{interval_text(gaps[0]['model_interval'])}. The memory of finding the mask is not part of this."
    )
    tables = {
        f"{_UNLEARNING} (s)": _pooled(rows, "seconds"),
        f"processor {_UNLEARNING} (s)": _pooled(rows, "cpu_seconds"),
        f"{_WHOLE} (s)": whole,
        f"{memory} (MiB)": used,
        "mean gap (points)": gaps,
    }
    return Claim(
        5,
        "time and memory",
        "With a learned mask unlearning takes less time and memory than on all parameters, for the same or a better "
        "gap.",
        _NO if worse else _all([_judge(pooled[0])[0] for pooled in (whole, used)]),
        verdict,
        [_table(tables)],
    )


def _greedy_and_warm(config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The first selection of a greedy search and one that differs in nothing else but stops at its warm start.

    Where there is no such pair, the selection that the claims are about, by itself.
    """
    for name, selection in config["selections"].items():
        for other, own in config["selections"].items():
            if selection["mode"] == "greedy" and own == {**selection, "mode": "warm"}:
                return name, other
    return learned_selection(config), None


def _search_cells(searches: Sequence[Cell]) -> list[str]:
    """One line on the searches of a setting, behind its names."""
    rises = [_rise(row) for row in searches]
    means = [
        statistics.fmean(values)
        for values in (
            [row["objective_before"] for row in searches],
            [row["objective_after"] for row in searches],
            rises,
        )
    ]
    low, high = bootstrap_interval(rises)
    swaps = statistics.fmean(row["swaps"] for row in searches)
    higher = sum(rise > 0 for rise in rises)
    numbers = [f"{mean:.3g}" for mean in means]
    return [str(len(searches)), *numbers, f"[{low:+.2g}, {high:+.2g}]", f"{higher} of {len(searches)}", f"{swaps:.1f}"]


def _rise(row: Cell) -> float:
    return row["objective_after"] - row["objective_before"]


def _models(outcome: Outcome, several: bool) -> list[dict[str, Any]]:
    """The chosen models and their number of requests."""
    settings = outcome.config["settings"]
    rows = [row for row in outcome.found["chosen"] if row["selection"]]
    asked = {name: setting.get("requests", 1) for name, setting in settings.items()}  # older runs know no requests
    return [
        {**row, "setting": _name(outcome, row["setting"], several), "requests": asked[row["setting"]]} for row in rows
    ]


def _name(outcome: Outcome, setting: str, several: bool) -> str:
    """Of a setting, with that of its experiment where there are several."""
    return f"{outcome.name}: {setting}" if several else setting


def _mask_or_not(outcome: Outcome, several: bool) -> list[dict[str, Any]]:
    """The chosen models with the learned mask, and those of which everything was trained; with the whole time."""
    selections, mask = outcome.config["selections"], learned_selection(outcome.config)
    rows = []
    for row in _models(outcome, several):
        side = _WITH if row["selection"] == mask else _WITHOUT
        if side == _WITH or selections[row["selection"]]["kind"] == "everything":
            whole = {} if "failed" in row else {"total_seconds": row["seconds"] + row["choose_seconds"]}
            rows.append({**row, **whole, "selection": side})
    return rows


def _pooled(rows: Sequence[Cell], figure: str) -> list[dict[str, Any]]:
    """One side against the other, over all settings and in each; also the means of both."""
    found = compare(rows, [_WITHOUT], figure)
    for row in found["pooled"]:
        pairs = [pair for pair in found["pairs"] if row["setting"] in (EVERYWHERE, pair["setting"])]
        row |= {side: statistics.fmean(pair[side] for pair in pairs) for side in ("own", "other")}
    return found["pooled"]


def _memory(rows: Sequence[Cell]) -> tuple[str, list[dict[str, Any]]]:
    """What the first measured figure of memory is called, and `_pooled` of it."""
    return next((title, pooled) for figure, title in MEMORY.items() if (pooled := _pooled(rows, figure)))


def _all(words: Sequence[str]) -> str:
    """Whether a claim of several parts holds."""
    if set(words) == {_YES}:
        return _YES
    if _YES in words:
        return "Holds in part"
    return next((word for word in (_NO, _OPEN) if word in words), _UNKNOWN)


def _judge(row: Cell, won: float = 0.0) -> tuple[str, list[str]]:
    """Whether a pooled difference meets the criterion, and what keeps it from doing so."""
    if row["models"] < _LEAST_MODELS:
        return _UNKNOWN, [f"{row['models']} of the at least {_LEAST_MODELS} pairs of an original and a retrained model"]
    word, faults = _YES, []
    for name, over in (("interval", "pairs"), ("model_interval", "models")):
        low, high = row[name]
        if high >= 0:
            where, found = ("lies above 0", _NO) if low > 0 else ("contains 0", _OPEN)
            faults.append(f"the interval over {over}, {interval_text((low, high))}, {where}")
            word = _NO if _NO in (word, found) else found
    if row["won"] < won * row["pairs"]:
        word = _NO
        faults.append(f"less than {share_text(won)} of the pairs are won")
    return word, faults


def _verdict(what: str, unit: str, pooled: Sequence[Cell], won: float = 0.0) -> str:
    """Whether a comparison meets the criterion over all settings, why not, and in which setting it does otherwise."""
    row, *settings = pooled
    word, faults = _judge(row, won)
    text = (
        f"{word}: {what} differs by {row['mean']:+.2f} {unit} and is smaller in {row['won']} of {row['pairs']} pairs "
        f"({share_text(row['won'] / row['pairs'])}){'; ' if faults else ''}{', '.join(faults)}."
    )
    judged = {other["setting"]: _judge(other, won)[0] for other in settings}
    for other in (_YES, _NO):
        names = [setting for setting, found in judged.items() if found == other != word]
        text += f" Taken alone, {', '.join(names)}: {other.lower()}." if names else ""
    return text


def _table(rows: Mapping[str, Sequence[Cell]], won: float = 0.0) -> Table:
    lines = []
    for figure, pooled in rows.items():
        for place, row in enumerate(pooled):
            means = [f"{row[name]:.2f}" for name in ("own", "other")]
            intervals = [interval_text(row[name]) for name in ("interval", "model_interval")]
            share = f"{row['won']} ({share_text(row['won'] / row['pairs'])})"
            met = _judge(row, won)[0].lower()
            title = "" if place else figure
            cells = [title, row["setting"], str(row["pairs"]), *means, f"{row['mean']:+.2f}", *intervals, share, met]
            lines.append(Row(cells))
    return Table(_COLUMNS, lines, labels=2)
