"""Pictures of a run as SVG markup that takes the page's text colour, so that one picture serves light and dark."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from pymape.masks import ModuleMasks

__all__ = ["bars", "dots", "histograms", "lines", "mask_picture", "standalone"]

_INK = "#010203"  # stands for the page's text colour until the markup exists
_LEAST_DOT = 0.1
_COLORS = ("#2f8fc4", "#e0812b", "#4aa564", "#b365b0")


def mask_picture(masks: ModuleMasks) -> str:
    """The layers x modules picture of masks."""
    with _style():
        return _svg(masks.plot(None))


def histograms(
    panels: Mapping[str, Mapping[str, Tensor]],
    label: str,
    *,
    log: bool = False,
    log_shares: bool = False,
    columns: int = 30,
) -> str:
    """Side-by-side histograms over one common axis: share of the records in each bin.

    Args:
        panels: title of a panel to {name of a distribution: [N] values}.
        label: name of the horizontal axis.
        log: draw the horizontal axis logarithmic where the values span two decades (those below 1e-6 count as 1e-6).
        log_shares: draw the vertical axis logarithmic, where most records share one bin.
        columns: number of bins.

    Returns:
        SVG markup.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    drawn = {title: {name: _clean(values, log) for name, values in series.items()} for title, series in panels.items()}
    everything = np.concatenate([values for series in drawn.values() for values in series.values()])
    low, high = (float(everything.min()), float(everything.max())) if len(everything) else (1.0, 1.0)
    log = log and high >= 100 * low  # within two decades a linear axis is easier to read
    if not high > low:
        low, high = low - 0.5, low + 0.5
    edges = np.geomspace(low, high, columns + 1) if log else np.linspace(low, high, columns + 1)
    with _style():
        figure = Figure(figsize=(10.5, 2.9), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(drawn), sharey=True))
        for axis, (title, series) in zip(axes, drawn.items(), strict=True):
            for color, (name, values) in zip(_COLORS, series.items(), strict=False):
                weights = np.full(len(values), 100 / max(len(values), 1))
                axis.hist(values, edges, weights=weights, color=color, alpha=0.3)
                axis.hist(values, edges, weights=weights, color=color, histtype="step", linewidth=1.6, label=name)
            axis.set(title=title, xlabel=label, xscale="log" if log else "linear")
            if log:
                # Fractions of a decade get no label of their own: they would run into each other.
                axis.xaxis.set_major_locator(LogLocator(numticks=7))
                axis.xaxis.set_minor_formatter(NullFormatter())
            axis.legend(frameon=False, fontsize="small")
        if log_shares:
            axes[0].set_yscale("log")
            axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel("% of records")
        return _svg(figure)


def bars(groups: Mapping[str, Mapping[str, list[float]]], label: str, levels: Mapping[str, float] | None = None) -> str:
    """Bars of the mean, one a group and method, with a dot a seed.

    Args:
        groups: name of a group to {method: one value a seed}.
        label: name of the vertical axis.
        levels: name of a dashed line to its height.

    Returns:
        SVG markup.
    """
    from matplotlib.figure import Figure

    methods = list(next(iter(groups.values())))
    width = 0.8 / len(methods)
    with _style():
        figure = Figure(figsize=(10.5, 3.2), layout="constrained")
        axis = figure.subplots()
        for index, (color, method) in enumerate(zip(_COLORS, methods, strict=False)):
            places = np.arange(len(groups)) + (index - (len(methods) - 1) / 2) * width
            values = [series[method] for series in groups.values()]
            axis.bar(places, [np.mean(column) for column in values], width * 0.9, color=color, alpha=0.45, label=method)
            for place, column in zip(places, values, strict=True):
                axis.plot(
                    [place] * len(column),
                    column,
                    "o",
                    color=color,
                    markersize=5,
                    markeredgecolor=_INK,
                    markeredgewidth=0.5,
                )
        for name, height in (levels or {}).items():
            axis.axhline(height, color=_INK, linewidth=1, linestyle="--", label=name)
        axis.set_xticks(range(len(groups)), list(groups))
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        figure.legend(frameon=False, ncols=len(methods) + len(levels or {}), loc="outside upper right")
        return _svg(figure)


def dots(rows: Mapping[str, Mapping[str, float]], label: str, joined: tuple[str, str]) -> str:
    """A row of dots for everything that is compared, over one logarithmic axis.

    Args:
        rows: name of a row, from the top down, to {series: value > 0}; values below 0.1 are drawn there.
        label: name of the horizontal axis.
        joined: the two series that are compared: a line joins their dots, in the colour of the smaller value.

    Returns:
        SVG markup.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    others = [name for name in series if name not in joined]
    colors = dict(zip((*joined, *others), (*_COLORS[:2], _INK, _INK), strict=False))
    with _style():
        figure = Figure(figsize=(10.5, 1 + 0.24 * len(rows)), layout="constrained")
        axis = figure.subplots()
        for place, row in enumerate(rows.values()):
            found = {name: max(value, _LEAST_DOT) for name, value in row.items()}
            ends = [found[name] for name in joined]
            closer = min(joined, key=lambda name: found[name])
            axis.plot(ends, [place, place], color=colors[closer], linewidth=3, alpha=0.45, solid_capstyle="butt")
            for name, value in found.items():
                filled = name in joined
                axis.plot(
                    value, place, "o" if filled or name == others[0] else "|", color=colors[name], markersize=7,
                    markerfacecolor=colors[name] if filled else "none", label=name if place == 0 else None,
                )  # fmt: skip
        axis.set_yticks(range(len(rows)), list(rows))
        axis.set(xscale="log", xlabel=label)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", color=_INK, alpha=0.12)
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        figure.legend(frameon=False, ncols=len(series), loc="outside upper center")
        return _svg(figure)


def standalone(markup: str) -> str:
    """A picture as a file of its own: black on white, since no page gives it a colour."""
    return markup.replace("<svg", '<svg style="background: white; color: black"', 1)


def lines(
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
    label: str,
    *,
    steps: bool = False,
    places: Sequence[float] | None = None,
) -> str:
    """Side-by-side curves over a common axis.

    Args:
        panels: name of a vertical axis to {name of a curve: its values; None where it has ended}.
        label: name of the horizontal axis.
        steps: draw steps instead of straight lines between the values.
        places: where the values of a curve lie on the axis; default 0, 1, 2, ...

    Returns:
        SVG markup.
    """
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(10.5, 3.2), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(panels)))
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            for color, (name, values) in zip(_COLORS, curves.items(), strict=False):
                along = range(len(values)) if places is None else places
                points = [(x, y) for x, y in zip(along, values, strict=True) if y is not None]
                drawn, kept = [x for x, _ in points], [y for _, y in points]
                axis.plot(drawn, kept, color=color, linewidth=1.8, drawstyle="steps-post" if steps else "default")
                if points:
                    axis.plot(drawn[-1:], kept[-1:], "o", color=color, markersize=5, label=name)
            axis.set(title=title, xlabel=label)
            axis.xaxis.get_major_locator().set_params(integer=True)
        # Above the panels: within them it would lie on the curves.
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize="small")
        return _svg(figure)


def _style() -> Any:
    import matplotlib

    style: dict[Any, Any] = {
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "axes.titlecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "svg.fonttype": "none",
        "svg.hashsalt": "pymape",  # else the ids are others every time
    }
    return matplotlib.rc_context(style)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :].replace(_INK, "currentColor")
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    # Several pictures share one page, and matplotlib numbers its ids anew in each.
    prefix = "p" + hashlib.sha256(markup.encode()).hexdigest()[:8]
    markup = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', markup)
    return re.sub(r'(url\(#|href="#)', rf"\1{prefix}", markup)


def _clean(values: Tensor, log: bool) -> np.ndarray:
    array = values.detach().double().cpu().numpy()
    array = array[np.isfinite(array)]
    return np.maximum(array, 1e-6) if log else array
