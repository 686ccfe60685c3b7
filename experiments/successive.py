"""Successive requests on a text classifier: masked and unmasked sessions beside retraining after every request.

    python experiments/successive.py --model MiniLM --train train.tsv --validation dev.tsv --test test.tsv

The encoder is fine-tuned on all records; every request then forgets a random share of them. After each request the
models are judged on all records forgotten so far, on the rest and on the test set, and compared with the encoder
fine-tuned from scratch without the forgotten records. A session runs at the learning rate that does best on its first
request, by a rule that sees neither a retrained model nor the test set:

    minimise |A_forget - A_val(original)| + |A_retain - A_retain(original)| + |A_val - A_val(original)|

with accuracies A in percent. Writes `successive.md` and `successive.json` into --output; an interrupted run continues
in its --work folder.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from pymape.checkpoint import load_model
from pymape.commands.encoding import Encoder
from pymape.config import DataConfig, MaskConfig, TrainConfig, UnlearnConfig
from pymape.data.tables import Records, load_records, read_table
from pymape.metrics import METRICS, mean_gap, predict, summarise
from pymape.session import UnlearnSession
from pymape.session.request import start
from pymape.storage.files import atomic_write
from pymape.storage.runs import environment
from pymape.storage.store import STATE

KINDS = ("masked", "unmasked")
CLOCKS = ("cpu_seconds", "seconds")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder of a pretrained encoder and its tokenizer")
    parser.add_argument("--train", required=True, help="text TAB label lines without a header")
    parser.add_argument("--validation", required=True, help="the same, records that the learning rate is chosen on")
    parser.add_argument("--test", required=True, help="the same, records that the models are judged on")
    parser.add_argument("--output", default="docs/results", help="folder of the table")
    parser.add_argument("--work", help="folder for sessions and models, kept; default: a temporary one")
    parser.add_argument("--records", type=int, default=0, help="train on the first so many records; 0: on all")
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.02, help="share of the records that a request forgets")
    parser.add_argument("--objective", default="gd")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[5e-6, 1e-5, 2e-5, 3e-5, 5e-5, 1e-4], help="to choose from"
    )
    parser.add_argument("--epochs", type=float, default=0.1, help="of a request, over the retain records")
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--lam", type=float, default=1.0)
    parser.add_argument("--importance-samples", type=int, default=2000)
    parser.add_argument("--train-lr", type=float, default=1e-4)
    parser.add_argument("--train-epochs", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def convert(source: str, target: Path, most: int = 0) -> str:
    """Lines of text and label as a csv file with ids, shortest first: judging in this order needs little padding."""
    lines = Path(source).read_text(encoding="utf-8").splitlines()[: most or None]
    rows = [(number, *line.rsplit("\t", 1)) for number, line in enumerate(lines)]
    with target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "text", "label"])
        writer.writerows(sorted(rows, key=lambda row: len(row[1])))
    return str(target)


def once(path: Path, compute: Callable[[], Any]) -> Any:
    """What a JSON file holds; computed and written there if there is none."""
    if not path.exists():
        value = compute()
        with atomic_write(path) as new:
            new.write_text(json.dumps(value) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


class Judge:
    """UA, RA, TA and MIA after each request, and the records to measure them on."""

    def __init__(
        self, config: UnlearnConfig, model: Path, source: Records, requests: list[list[str]], test: str
    ) -> None:
        loaded, tokenizer = load_model(dataclasses.replace(config, model=str(model), train_first=False), source)
        encode = Encoder(config, loaded, tokenizer)
        self.collate, self.seed, self.source, self.requests = encode.collate, config.seed, source, requests
        self.rows = encode(source.columns, "data.path", source.ids)
        self.test = encode(read_table(test, "test"), "test")

    def forgotten(self, number: int) -> set[str]:
        return {name for ids in self.requests[:number] for name in ids}

    def remaining(self, number: int) -> Records:
        gone = self.forgotten(number)
        return self.source.select([row for row, name in enumerate(self.source.ids) if name not in gone])

    def __call__(self, folder: Path, numbers: Iterable[int]) -> list[dict[str, float]]:
        """A model's figures after each of some requests."""
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        train, test = (predict(model, rows, collate_fn=self.collate) for rows in (self.rows, self.test))
        figures = []
        for gone in map(self.forgotten, numbers):
            forgotten = torch.tensor([row["id"] in gone for row in self.rows])
            figures.append(summarise(train.select(forgotten), train.select(~forgotten), test, seed=self.seed))
        return figures


def retrain(config: UnlearnConfig, judge: Judge, number: int, work: Path) -> dict[str, Any]:
    """Figures of the encoder fine-tuned without what the first requests forget, and the seconds it took."""
    clocks = (time.process_time, time.perf_counter)
    begun = [clock() for clock in clocks]
    start(config, judge.remaining(number), work / f"retrained-{number}")
    seconds = [clock() - before for clock, before in zip(clocks, begun, strict=True)]
    return dict(zip(CLOCKS, seconds, strict=True)) | {"figures": judge(work / f"retrained-{number}", [number])[0]}


def request(folder: Path, config: UnlearnConfig, judge: Judge, number: int) -> tuple[dict[str, Any], Path]:
    """The receipt of a request, which is met if it is not yet, and the session's model folder."""
    there = (folder / STATE).exists()
    with UnlearnSession(folder) if there else UnlearnSession.create(folder, config) as session:
        return session.request(f"request-{number}", judge.requests[number - 1]), session.model_folder


def cost(receipt: dict[str, Any]) -> dict[str, float]:
    """Seconds of a request without judging itself."""
    return {clock: sum(spent for phase, spent in receipt[clock].items() if phase != "evaluate") for clock in CLOCKS}


def selection(receipt: dict[str, Any]) -> float:
    """What the learning rate minimises; the receipt's test set is the validation set."""
    before, after = receipt["metrics"]["before"], receipt["metrics"]["after"]
    forget = abs(100 - after["UA"] - before["TA"])
    return forget + sum(abs(after[name] - before[name]) for name in ("RA", "TA"))


def run_session(config: UnlearnConfig, lrs: list[float], judge: Judge, work: Path, kind: str) -> dict[str, Any]:
    """Cost and figures of every request of a session at the learning rate that its first request chooses."""
    tried = []
    for lr in lrs:
        receipt, _ = request(work / f"{kind}-{lr:g}", dataclasses.replace(config, lr=lr), judge, 1)
        tried.append({"lr": lr, "selection": selection(receipt), **cost(receipt), **receipt["metrics"]["after"]})
        print(f"{kind}, lr {lr:g}: {tried[-1]['selection']:.2f}", flush=True)
    lr = min(tried, key=lambda row: row["selection"])["lr"]
    rows = []
    for number in range(1, len(judge.requests) + 1):
        receipt, model = request(work / f"{kind}-{lr:g}", dataclasses.replace(config, lr=lr), judge, number)
        judged = once(work / f"{kind}-{lr:g}-{number}.json", lambda: judge(model, [number])[0])  # noqa: B023
        selected = 1.0 if receipt["masks"] is None else receipt["masks"]["cost"]
        rows.append({**cost(receipt), "selected": selected, "figures": judged})
        print(f"{kind}, request {number}: {rows[-1]}", flush=True)
    return {"lr": lr, "tried": tried, "requests": rows}


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    data = DataConfig(
        convert(arguments.train, work / "train.csv", arguments.records),
        test=convert(arguments.validation, work / "validation.csv"),
        max_length=arguments.max_length,
        importance_samples=arguments.importance_samples,
    )
    base = UnlearnConfig(
        arguments.model,
        data,
        objective=arguments.objective,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        masks=MaskConfig(budget=arguments.budget, lam=arguments.lam),
        train_first=True,
        train=TrainConfig(arguments.train_lr, arguments.train_epochs, arguments.batch_size, group_by_length=True),
        seed=arguments.seed,
    )
    source = load_records(data.path)
    count = max(1, round(arguments.share * len(source)))
    drawn = random.Random(arguments.seed).sample(sorted(source.ids), count * arguments.requests)
    requests = [drawn[first : first + count] for first in range(0, len(drawn), count)]
    numbers = range(1, len(requests) + 1)
    original = work / "original"
    once(work / "original.json", lambda: start(base, source, original))
    judge = Judge(base, original, source, requests, convert(arguments.test, work / "test.csv"))
    found = {"records": len(source), "a_request": count}
    found["untouched"] = once(work / "untouched.json", lambda: judge(original, numbers))
    begun = dataclasses.replace(base, model=str(original), train_first=False)
    for kind, masks in zip(KINDS, (base.masks, MaskConfig(objective="everything")), strict=True):
        found[kind] = run_session(dataclasses.replace(begun, masks=masks), arguments.lr, judge, work, kind)
    found["retrained"] = []
    for number in numbers:
        path = work / f"retrained-{number}.json"
        found["retrained"].append(once(path, lambda: retrain(base, judge, number, work)))  # noqa: B023
        print(f"retrained, request {number}: {found['retrained'][-1]}", flush=True)
    return found


def gaps(found: dict[str, Any]) -> dict[str, list[float]]:
    """Mean gap to the retrained model after every request, of the original and of both sessions."""
    models = {"nothing": found["untouched"]} | {
        kind: [row["figures"] for row in found[kind]["requests"]] for kind in KINDS
    }
    gold = [row["figures"] for row in found["retrained"]]
    return {name: [mean_gap(*pair) for pair in zip(rows, gold, strict=True)] for name, rows in models.items()}


def markdown(rows: list[list[str]], left: int) -> str:
    """A table whose columns after the first `left` are numbers."""
    rules = ["---" if column < left else "---:" for column in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rules, *rows[1:]))


def page(found: dict[str, Any], arguments: argparse.Namespace, facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    gap, columns = gaps(found), ("nothing", *KINDS)
    spent = {kind: [row["cpu_seconds"] for row in found[kind]["requests"]] for kind in KINDS}
    spent["retraining"] = [row["cpu_seconds"] for row in found["retrained"]]
    head = ["after request", "forgotten", "gap, nothing done", *(f"gap, {kind}" for kind in KINDS)]
    rows = [[*head, *(f"CPU s, {name}" for name in spent)]]
    for number in range(len(found["retrained"])):
        of_gaps = [f"{gap[name][number]:.2f}" for name in columns]
        of_costs = [f"{seconds[number]:.0f}" for seconds in spent.values()]
        rows.append([str(number + 1), str((number + 1) * found["a_request"]), *of_gaps, *of_costs])
    means = [sum(gap[name]) / len(gap[name]) for name in columns]
    totals = [sum(seconds) for seconds in spent.values()]
    rows.append(["**mean, total**", "", *(f"**{mean:.2f}**" for mean in means), *(f"**{s:.0f}**" for s in totals)])

    last = {"original": found["untouched"][-1]}
    last |= {kind: found[kind]["requests"][-1]["figures"] for kind in KINDS}
    last |= {"retrained": found["retrained"][-1]["figures"]}
    final = [["model", *METRICS]]
    final += [[name, *(f"{figures[metric]:.1f}" for metric in METRICS)] for name, figures in last.items()]

    grid = [["learning rate", *(f"rule, {kind}" for kind in KINDS)]]
    for row, lr in enumerate(arguments.lr):
        values = [f"{found[kind]['tried'][row]['selection']:.2f}" for kind in KINDS]
        chosen = [found[kind]["lr"] == lr for kind in KINDS]
        grid.append(
            [f"{lr:g}", *(f"**{value}**" if best else value for value, best in zip(values, chosen, strict=True))]
        )

    shares = [row["selected"] for row in found["masked"]["requests"]]
    selected = " to ".join(dict.fromkeys(f"{share:.1%}" for share in (min(shares), max(shares))))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    machine = ", ".join(f"{name} {value}" for name, value in facts["machine"].items() if value is not None)
    return f"""# Successive requests

{len(found["retrained"])} requests, each to forget {found["a_request"]} random records ({arguments.share:.1%}) of the
{found["records"]} that {Path(arguments.model).name} was fine-tuned on ({arguments.train_epochs:g} epochs, learning rate
{arguments.train_lr:g}, texts of at most {arguments.max_length} tokens), one after the other in an `UnlearnSession`:
objective `{arguments.objective}`, {arguments.epochs:g} epochs a request, batches of {arguments.batch_size}. The masks
(budget {arguments.budget:.0%}, lam {arguments.lam:g}) select {selected} of the parameters of heads and filters. One
run, seed {arguments.seed}.

{markdown(rows, 0)}

Gap: mean distance of UA, RA, TA and MIA, in percentage points, to the encoder fine-tuned from scratch without any of
the records forgotten so far; UA and MIA are those of all records forgotten so far. CPU s: processor time of one thread,
which other work on the machine hardly touches (wall time is in the JSON file); loading, importance, search, unlearning
and saving of a request, without judging. The first masked request also measures the retain importance that the later
ones reuse.

The models after the last request:

{markdown(final, 1)}

Each session runs at the learning rate that does best on its first request by

    |A_forget - A_val(original)| + |A_retain - A_retain(original)| + |A_val - A_val(original)|

with accuracies A in percent and a validation set of its own, so that the choice sees neither a retrained model nor the
test set. The seconds leave the choice out, which takes as many first requests as there are rates.

{markdown(grid, 0)}

{machine}; {versions}; commit {facts["commit"]}; {facts["date"]}.
"""


def main() -> None:
    arguments = options()
    torch.set_num_threads(1)  # processor time of threads that wait for each other would mean nothing
    settings = {name: value for name, value in vars(arguments).items() if name not in ("work", "output")}
    settings |= {name: os.path.basename(settings[name]) for name in ("model", "train", "validation", "test")}
    with tempfile.TemporaryDirectory(prefix="pymape-") as scratch:
        work = Path(arguments.work or scratch)
        begun = once(work / "settings.json", lambda: settings)
        if begun != settings:
            raise SystemExit(f"work must be new, or that of a run with these settings, got one with {begun}")
        found = run(arguments, work)
    facts = {name: value for name, value in environment().items() if name != "command"}
    output = Path(arguments.output)
    with atomic_write(output / "successive.json") as path:
        content = {**facts, "settings": settings, "gaps": gaps(found), **found}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = page(found, arguments, facts)
    with atomic_write(output / "successive.md") as path:
        path.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
