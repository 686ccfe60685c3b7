"""The figures of docs/s3t.md, one for each claim, from formulas, the simulator and the files of other runs.

    pymape s3t demo
    python experiments/s3t_figures.py --demo runs/s3t-demo/summary.json

Writes docs/figures/s3t_*.svg. Figures whose file is not given are left as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pymape.ops import simulate_deletions
from pymape.s3t.sequences import chain_cover, cyclic_sequences, depth_table, worst_depth
from pymape.s3t.theory import capacity, mean_depth
from pymape.storage.files import atomic_write

Draw = Callable[[Any], None]
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "svg.fonttype": "none",
    "svg.hashsalt": "pymape",
    "legend.frameon": False,
}
_RUNS = 20_000


def save(path: Path, panels: list[Draw], size: tuple[float, float]) -> None:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        for axis, draw in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            draw(axis)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
    print(f"wrote {path}")


def depth(folder: Path) -> None:
    """Depth after deletions in d slices: worst case and mean over all sets of d slices."""
    slices = 6
    selections = {
        "chain-cover, B = 20": chain_cover(slices),
        "cyclic, B = 20": cyclic_sequences(slices, 20),
        "cyclic, B = 6": cyclic_sequences(slices, 6),
        "SISA, B = 1": [tuple(range(slices))],
    }

    def panel(axis: Any) -> None:
        sizes = np.array([bin(deleted).count("1") for deleted in range(2**slices)])
        for name, orders in selections.items():
            table = depth_table(orders)[::-1]  # the table is by what is left, its mirror by what is deleted
            mean = [table[sizes == d].mean() for d in range(slices + 1)]
            (line,) = axis.plot(mean, marker="o", label=f"{name}: mean")
            axis.plot(worst_depth(orders), color=line.get_color(), linestyle=":", label="worst case")
        axis.set(xlabel="slices with deletions, d", ylabel="stages left (L = 6)", ylim=(0, None))
        axis.legend(ncols=2, fontsize="small")

    save(folder / "s3t_depth.svg", [panel], (7.5, 4.0))


def deletions(folder: Path) -> None:
    """Requests until shards are dead: exact and simulated, and how depth falls on the way."""
    shards, slices = 5, 6
    budgets = range(1, slices + 1)

    def until(axis: Any) -> None:
        for name, field in (("all shards dead", "all_dead"), ("first shard dead", "first_dead")):
            exact = [getattr(capacity(cyclic_sequences(slices, budget), shards), field) for budget in budgets]
            (line,) = axis.plot(budgets, exact, label=f"{name}: exact")
            means, errors = [], []
            for budget in budgets:
                runs = simulate_deletions(cyclic_sequences(slices, budget), shards, runs=_RUNS, seed=budget)
                values = getattr(runs, field).double()
                means.append(values.mean().item())
                errors.append(2 * values.std().item() / _RUNS**0.5)
            axis.errorbar(budgets, means, errors, fmt="o", color=line.get_color(), label=f"{_RUNS:,} simulated runs")
        axis.set(
            xlabel="sequences of a shard, B (B = 1 is SISA)", ylabel="uniform requests (m = 5, L = 6)", ylim=(0, None)
        )
        axis.legend(fontsize="small")

    def on_the_way(axis: Any) -> None:
        requests = range(0, 121, 2)
        for name, orders in (
            ("chain-cover, B = 20", chain_cover(slices)),
            ("cyclic, B = 20", cyclic_sequences(slices, 20)),
            ("cyclic, B = 6", cyclic_sequences(slices, 6)),
            ("SISA, B = 1", [tuple(range(slices))]),
        ):
            axis.plot(requests, [mean_depth(orders, number, shards=shards) for number in requests], label=name)
        axis.set(xlabel="uniform requests to all shards", ylabel="expected stages left in a shard", ylim=(0, None))
        axis.legend(fontsize="small")

    save(folder / "s3t_deletions.svg", [until, on_the_way], (10.5, 4.0))


def accuracy(folder: Path, summary: Path) -> None:
    """Accuracy and depth, request by request, of the demo."""
    runs = json.loads(summary.read_text(encoding="utf-8"))["runs"]

    def of(value: Callable[[dict[str, Any], dict[str, Any]], float | None], label: str) -> Draw:
        def panel(axis: Any) -> None:
            for name, run in runs.items():
                values = [value(run, step) for step in run["steps"]]
                axis.step(range(len(values)), values, where="post", label=name)
            axis.set(xlabel="requests, one record each", ylabel=label)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend(fontsize="small")

        return panel

    panels = [
        of(lambda run, step: step["accuracy"], "accuracy on the test part (%)"),
        of(lambda run, step: 100 * float(np.mean(step["depths"])) / run["slices"], "slices that act (%)"),
        of(lambda run, step: step["remaining"], "requests expected until the next shard dies"),
    ]
    save(folder / "s3t_accuracy.svg", panels, (11.5, 3.6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--demo", type=Path, help="summary.json of `pymape s3t demo`")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    arguments = parser.parse_args()
    depth(arguments.output)
    deletions(arguments.output)
    if arguments.demo is not None:
        accuracy(arguments.output, arguments.demo)


if __name__ == "__main__":
    main()
