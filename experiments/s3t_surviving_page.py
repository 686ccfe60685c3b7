"""The tables of `s3t_surviving.py`, from what its runs left in their work folder.

    python experiments/s3t_surviving_page.py --work work

It writes `s3t.md` and `s3t.json` into --output.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s3t_surviving import CHOICE_SEED, SELECTIONS, SETS, SLICES, TASKS, served, text
from successive import markdown

from pymape.s3t.sequences import prefixes
from pymape.storage.files import atomic_write

__all__ = ["write"]

TITLES = {"digits": "Digits, a ViT of 8 layers", "sst2": "SST-2, MiniLM of 6 layers"}
COLUMNS = {
    "chain-cover": "S3T, chain cover, B = 6",
    "cyclic-6": "S3T, cyclic, B = 6",
    "cyclic-4": "S3T, cyclic, B = 4",
    "SISA": "SISA",
    "plain": "plain",
    "longer": "plain, as many steps",
}
SIZES = range(SLICES, 0, -1)

Row = dict[str, dict[str, float]]  # "accuracy", "slices", "dead" -> method -> value


def rows_of(cell: Mapping[str, Any]) -> dict[tuple[int, ...], Row]:
    """What each method serves for every set of surviving slices."""
    rows = {}
    for kept in SETS:
        chains = {name: served(sequences, kept) for name, sequences in SELECTIONS.items()}
        accuracy = {name: cell["stages"][text(prefix)] for name, prefix in chains.items()}
        slices: dict[str, float] = {name: len(prefix) for name, prefix in chains.items()}
        dead, *alive = cell["survival"][text(kept)]
        right = sum(p * a for p, a in zip(alive, cell["sisa"], strict=True))
        accuracy |= {"SISA": dead * cell["majority"] + right}
        accuracy |= {name: cell[name][text(kept)] for name in ("plain", "longer")}
        slices["SISA"] = SLICES * sum(p * k for k, p in enumerate(alive, start=1)) / len(alive)
        rows[kept] = {"accuracy": accuracy, "slices": slices, "SISA": {"dead": dead, "right": right}}
    return rows


def over(cells: Sequence[Mapping[str, Any]], size: int, value: Callable[[Row], float]) -> dict[str, Any]:
    """Mean over the sets of one size, then mean and sample standard deviation over the seeds."""
    values = []
    for cell in cells:
        rows = rows_of(cell)
        values.append(statistics.fmean(value(row) for kept, row in rows.items() if len(kept) == size))
    return spread(values)


def spread(values: list[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def summary(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a number of surviving slices."""
    rows = []
    for size in SIZES:
        found: dict[str, Any] = {"surviving": size, "sets": sum(len(kept) == size for kept in SETS)}
        found["accuracy"] = {m: over(cells, size, lambda row: row["accuracy"][m]) for m in COLUMNS}  # noqa: B023
        found["difference"] = {
            m: over(cells, size, lambda row: row["accuracy"]["chain-cover"] - row["accuracy"][m])  # noqa: B023
            for m in list(COLUMNS)[1:]
        }
        found["slices"] = {m: over(cells, size, lambda row: row["slices"][m]) for m in list(COLUMNS)[:4]}  # noqa: B023
        found["dead"] = over(cells, size, lambda row: row["SISA"]["dead"])
        right = over(cells, size, lambda row: row["SISA"]["right"])["values"]
        found["alive"] = spread([r / (1 - dead) for r, dead in zip(right, found["dead"]["values"], strict=True)])
        rows.append(found)
    return rows


def shown(figure: Mapping[str, Any], sign: str = "") -> str:
    mean = round(figure["mean"], 1) + 0.0  # no negative zero
    return f"{mean:{sign}.1f} ± {figure['std']:.1f}"


def verdict(rows: Sequence[Mapping[str, Any]], method: str) -> str:
    """For which numbers of surviving slices the chain cover is above or below a method in every seed."""
    found: dict[str, list[str]] = {"above": [], "below": [], "no clear difference": []}
    for row in rows:
        values = row["difference"][method]["values"]
        side = "above" if min(values) > 0 else "below" if max(values) < 0 else "no clear difference"
        found[side].append(str(row["surviving"]))
    parts = [f"{side} with {', '.join(sizes)}" for side, sizes in found.items() if sizes]
    return "; ".join(parts)


def section(task: str, found: Mapping[str, Any]) -> str:
    """A task's tables."""
    cells, rows, chosen = list(found["seeds"].values()), found["summary"], found["choice"]
    accuracy = [["surviving slices", *COLUMNS.values()]]
    accuracy += [[str(row["surviving"]), *(shown(row["accuracy"][m]) for m in COLUMNS)] for row in rows]
    others = list(COLUMNS)[1:]
    differences = [["surviving slices", *(f"minus {COLUMNS[m]}" for m in others)]]
    differences += [[str(row["surviving"]), *(shown(row["difference"][m], "+") for m in others)] for row in rows]
    depths = [["surviving slices", *(COLUMNS[m] for m in list(COLUMNS)[:4]), "SISA is dead", "accuracy of live SISA"]]
    for row in rows:
        served_slices = [f"{row['slices'][m]['mean']:.2f}" for m in list(COLUMNS)[:4]]
        depths.append([str(row["surviving"]), *served_slices, f"{row['dead']['mean']:.0%}", shown(row["alive"])])

    checkpoints = len(cells[0]["sisa"])
    costs = [["method", "stages", "stored bytes", "passes over the shard an epoch"]]
    for name, sequences in SELECTIONS.items():
        stages = prefixes(sequences)
        passes = sum(map(len, stages)) / SLICES
        costs.append([COLUMNS[name], str(len(stages)), f"{cells[0]['bytes'][name]:,}", f"{passes:.1f}"])
    costs.append(["SISA", str(checkpoints), f"{cells[0]['bytes']['SISA']:,}", f"{(checkpoints + 1) / 2:.1f}"])

    grid = [["learning rate", "epochs", "all slices", "one slice", ""]]
    for row in chosen["tried"]:
        best = (row["lr"], row["epochs"]) == (chosen["lr"], chosen["epochs"])
        values = (f"{row['all']:.1f}", f"{row['one']:.1f}", "chosen" if best else "")
        grid.append([f"{row['lr']:g}", str(row["epochs"]), *values])
    stage, lora, records = TASKS[task]["stage"], found["lora"], sum(cells[0]["slices"])
    versions = ", ".join(f"{name} {version}" for name, version in found["facts"]["versions"].items())
    return f"""## {TITLES[task]}

{records} records in slices of {min(min(c["slices"]) for c in cells)} to {max(max(c["slices"]) for c in cells)};
{cells[0]["test"]} test records; seeds {", ".join(found["seeds"])}. g = {found["layers_per_slice"]}; LoRA of
rank {lora["r"]}, alpha {lora["alpha"]:g}, targets `{lora["targets"]}`; batches of {stage.batch_size},
{chosen["epochs"]} epochs a stage, learning rate {chosen["lr"]:g}. The largest class has
{cells[0]["majority"]:.1f} % of the test records.

Accuracy on the test set in percent:

{markdown(accuracy, 0)}

Accuracy of S3T with the chain cover minus that of the others:

{markdown(differences, 0)}

In every seed, S3T with the chain cover is

{chr(10).join(f"- against {COLUMNS[m]}: {verdict(rows, m)};" for m in others)[:-1]}.

Slices' worth of records that the served model has learned from (of {SLICES}), mean; for S3T this is the depth:

{markdown(depths, 0)}

What is stored and trained (bytes of the first seed):

{markdown(costs, 1)}

Validation accuracy of plain training on seed {CHOICE_SEED}, which chose the learning rate and the epochs:

{markdown(grid, 0)}

One thread; {versions}; commit {found["facts"]["commit"]}; {found["facts"]["date"]}.
"""


def page(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as Markdown."""
    return f"""# S3T: what is served for every set of surviving slices

One shard of {SLICES} slices, all {len(SETS)} nonempty sets of surviving slices, by `experiments/s3t_surviving.py`.
Figures are means over the sets of one size, then mean ± standard deviation over the seeds, which draw the records, the
slices, the order of training and, for digits, the base.

- **S3T** serves the deepest chain whose slices have all survived. The cyclic sequences for B = 6 and the chain cover
  train the same number of stages.
- **SISA** trains all g L layers at every checkpoint, each going on from the one before. It has one order, and as many
  slices as it takes for its checkpoints to need at least the bytes of the chain cover's stages. Its slices are others
  than S3T's, so what is deleted are records: one random record of each slice that does not survive; the figures are
  exact expectations over these records. These are the fewest deletions that cost S3T a slice: more records of the same
  slices cost S3T nothing and SISA more. A dead shard counts with the accuracy of the largest class.
- **plain** is LoRA in the same layers, trained at once on exactly the surviving slices: what retraining would give, for
  the epochs of one S3T stage. **As many steps** trains as long as all stages of S3T's chain together, (d + 1) / 2 times
  the epochs for d slices. Neither is there when a request comes in: they show what exactness costs.

{chr(10).join(section(task, found) for task, found in tasks.items())}"""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(work: Path, output: Path) -> None:
    """Write `s3t.md` and `s3t.json` from the work folder of finished runs.

    Raises:
        SystemExit: nothing is finished.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        paths = sorted(work.glob(f"{task}-[0-9]*.json"))
        if not paths:
            continue
        read = {path.stem.removeprefix(f"{task}-"): read_json(path) for path in paths}
        about, chosen = (
            json.loads((work / f"{task}{end}.json").read_text(encoding="utf-8")) for end in ("", "-choice")
        )
        tasks[task] = {**about, "choice": chosen, "summary": summary(list(read.values())), "seeds": read}
    if not tasks:
        raise SystemExit(f"work must hold a finished run, got {str(work)!r}")
    with atomic_write(output / "s3t.json") as path:
        path.write_text(json.dumps(tasks, indent=1) + "\n", encoding="utf-8")
    content = page(tasks)
    with atomic_write(output / "s3t.md") as path:
        path.write_text(content, encoding="utf-8")
    print(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--work", type=Path, required=True, help="folder of finished runs")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the tables")
    arguments = parser.parse_args()
    write(arguments.work, arguments.output)


if __name__ == "__main__":
    main()
