"""Successive requests on a text classifier: masked and unmasked sessions beside retraining after every request.

    python experiments/successive.py --model MiniLM --train train.tsv --test dev.tsv --lr 1e-4 3e-4

The encoder is fine-tuned on all records; every request then forgets a random share of them. After each request the
models are judged on all records forgotten so far, on the rest and on the test set, and compared with the encoder
fine-tuned from scratch without the forgotten records. Writes `successive.md` and `successive.json` into --output.
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
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification

from pymape.config import DataConfig, MaskConfig, TrainConfig, UnlearnConfig
from pymape.data import Records, load_records, read_table
from pymape.files import atomic_write
from pymape.metrics import METRICS, evaluate, mean_gap
from pymape.pipeline import Encoder, load_model
from pymape.runs import environment
from pymape.session import UnlearnSession
from pymape.session_request import start

Rows = list[dict[str, Any]]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder of a pretrained encoder and its tokenizer")
    parser.add_argument("--train", required=True, help="text TAB label lines without a header")
    parser.add_argument("--test", required=True, help="the same, records never trained on")
    parser.add_argument("--output", default="docs/results", help="folder of the table")
    parser.add_argument("--work", help="folder for sessions and models, kept; default: a temporary one")
    parser.add_argument("--records", type=int, default=0, help="train on the first so many records; 0: on all")
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.02, help="share of the records that a request forgets")
    parser.add_argument("--objective", default="gd")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4], help="each kind of session keeps the best")
    parser.add_argument("--epochs", type=float, default=0.2, help="of a request, over the retain records")
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--lam", type=float, default=1.0)
    parser.add_argument("--importance-samples", type=int, default=2000)
    parser.add_argument("--train-lr", type=float, default=5e-5)
    parser.add_argument("--train-epochs", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def convert(source: str, target: Path, most: int = 0) -> str:
    """Lines of text and label as a csv file with ids."""
    lines = Path(source).read_text(encoding="utf-8").splitlines()[: most or None]
    with target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "text", "label"])
        writer.writerows([row, *line.rsplit("\t", 1)] for row, line in enumerate(lines))
    return str(target)


class Judge:
    """UA, RA, TA and MIA after each request, and the records to measure them on."""

    def __init__(self, config: UnlearnConfig, model: Path, source: Records, requests: list[list[str]]) -> None:
        loaded, tokenizer = load_model(dataclasses.replace(config, model=str(model), train_first=False), source)
        encode = Encoder(config, loaded, tokenizer)
        self.collate, self.seed, self.source, self.requests = encode.collate, config.seed, source, requests
        self.rows = encode(source.columns, "data.path", source.ids)
        self.test = encode(read_table(str(config.data.test), "data.test"), "data.test")

    def forgotten(self, number: int) -> set[str]:
        return {name for ids in self.requests[:number] for name in ids}

    def remaining(self, number: int) -> Records:
        gone = self.forgotten(number)
        return self.source.select([row for row, name in enumerate(self.source.ids) if name not in gone])

    def __call__(self, folder: Path, number: int) -> dict[str, float]:
        gone = self.forgotten(number)
        forget, retain = ([row for row in self.rows if (row["id"] in gone) == side] for side in (True, False))
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        return evaluate(model, forget=forget, retain=retain, test=self.test, collate_fn=self.collate, seed=self.seed)


def run_session(folder: Path, config: UnlearnConfig, judge: Judge) -> list[dict[str, Any]]:
    """Seconds and figures of every request."""
    found = []
    with UnlearnSession.create(folder, config) as session:
        for number, ids in enumerate(judge.requests, start=1):
            started = time.perf_counter()
            receipt = session.request(f"request-{number}", ids)
            seconds = time.perf_counter() - started
            # What a request needs besides being judged by itself.
            work = seconds - receipt["seconds"]["evaluate"]
            found.append({"seconds": work, "figures": judge(session.model_folder, number), "parts": receipt["seconds"]})
    return found


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    data = DataConfig(
        convert(arguments.train, work / "train.csv", arguments.records),
        test=convert(arguments.test, work / "test.csv"),
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
        train=TrainConfig(lr=arguments.train_lr, epochs=arguments.train_epochs, batch_size=arguments.batch_size),
        seed=arguments.seed,
    )
    source = load_records(data.path)
    count = max(1, round(arguments.share * len(source)))
    drawn = random.Random(arguments.seed).sample(source.ids, count * arguments.requests)
    requests = [drawn[first : first + count] for first in range(0, len(drawn), count)]
    start(base, source, work / "original")
    judge = Judge(base, work / "original", source, requests)

    retrained = []
    for number in range(1, len(requests) + 1):
        started = time.perf_counter()
        start(base, judge.remaining(number), work / f"retrained-{number}")
        seconds = time.perf_counter() - started
        retrained.append({"seconds": seconds, "figures": judge(work / f"retrained-{number}", number)})
        print(f"retrained after request {number}: {seconds:.0f} s, {retrained[-1]['figures']}", flush=True)

    sessions: dict[str, dict[str, Any]] = {}
    for kind in ("masked", "unmasked"):
        for lr in arguments.lr:
            masks = base.masks if kind == "masked" else MaskConfig(objective="everything")
            config = dataclasses.replace(base, model=str(work / "original"), train_first=False, masks=masks, lr=lr)
            rows = run_session(work / f"{kind}-{lr:g}", config, judge)
            for row, reference in zip(rows, retrained, strict=True):
                row["gap"] = mean_gap(row["figures"], reference["figures"])
            mean = sum(row["gap"] for row in rows) / len(rows)
            print(f"{kind}, lr {lr:g}: mean gap {mean:.2f}", flush=True)
            if kind not in sessions or mean < sessions[kind]["mean_gap"]:
                sessions[kind] = {"lr": lr, "mean_gap": mean, "requests": rows}
    untouched = [
        mean_gap(judge(work / "original", number), reference["figures"])
        for number, reference in enumerate(retrained, start=1)
    ]
    return {"records": len(source), "a_request": count, "retrained": retrained, "untouched": untouched} | sessions


def table(found: dict[str, Any], arguments: argparse.Namespace, facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    kinds = ("masked", "unmasked")
    head = ["after request", "forgotten", "gap, nothing done", *(f"gap, {kind}" for kind in kinds)]
    head += [*(f"s, {kind}" for kind in kinds), "s, retraining", *(f"{name}, retrained" for name in METRICS)]
    lines = [head, ["---:"] * len(head)]
    for number, reference in enumerate(found["retrained"]):
        rows = [found[kind]["requests"][number] for kind in kinds]
        lines.append([
            str(number + 1),
            str((number + 1) * found["a_request"]),
            f"{found['untouched'][number]:.2f}",
            *(f"{row['gap']:.2f}" for row in rows),
            *(f"{row['seconds']:.1f}" for row in rows),
            f"{reference['seconds']:.1f}",
            *(f"{reference['figures'][name]:.1f}" for name in METRICS),
        ])  # fmt: skip
    totals = [sum(row["seconds"] for row in found[kind]["requests"]) for kind in kinds]
    means = [found[kind]["mean_gap"] for kind in kinds]
    nothing = sum(found["untouched"]) / len(found["untouched"])
    retraining = sum(row["seconds"] for row in found["retrained"])
    gaps, seconds = [f"**{gap:.2f}**" for gap in (nothing, *means)], [f"**{s:.1f}**" for s in (*totals, retraining)]
    lines.append(["**mean, total**", "", *gaps, *seconds, *([""] * len(METRICS))])
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    machine = ", ".join(f"{name} {value}" for name, value in facts["machine"].items() if value is not None)
    rates = " and ".join(f"{found[kind]['lr']:g} ({kind})" for kind in kinds)
    text = f"""# Successive requests

{len(found["retrained"])} requests, each to forget {found["a_request"]} random records ({arguments.share:.1%}) of the
{found["records"]} that {Path(arguments.model).name} was fine-tuned on ({arguments.train_epochs:g} epochs, learning rate
{arguments.train_lr:g}), one after the other in an `UnlearnSession`: objective `{arguments.objective}`,
{arguments.epochs:g} epochs a request, budget {arguments.budget:.0%}, lam {arguments.lam:g}, learning rate {rates}, of
{", ".join(f"{lr:g}" for lr in arguments.lr)} the one with the smallest mean gap; seed {arguments.seed}, one run.

Gap: mean distance of UA, RA, TA and MIA, in percentage points, to the encoder fine-tuned from scratch without any of
the records forgotten so far; UA and MIA are those of all records forgotten so far. Seconds: masked ones include
importance, search, loading and saving; judging is left out throughout.

""" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n{machine}; {versions}; commit {facts['commit']}; {facts['date']}.\n"


def main() -> None:
    arguments = options()
    with tempfile.TemporaryDirectory(prefix="pymape-") as scratch:
        work = Path(arguments.work or scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = run(arguments, work)
    facts = {name: value for name, value in environment().items() if name != "command"}
    settings = {name: value for name, value in vars(arguments).items() if name not in ("work", "output")}
    settings |= {name: os.path.basename(settings[name]) for name in ("model", "train", "test")}
    output = Path(arguments.output)
    with atomic_write(output / "successive.json") as path:
        path.write_text(json.dumps({**facts, "settings": settings, **found}, indent=1) + "\n", encoding="utf-8")
    text = table(found, arguments, facts)
    with atomic_write(output / "successive.md") as path:
        path.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
