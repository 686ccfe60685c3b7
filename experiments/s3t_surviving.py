"""What is served of one shard for every set of slices that survive deletions: S3T, SISA and training on them anew.

    python experiments/s3t_surviving.py digits --work work
    python experiments/s3t_surviving.py sst2 --work work --model MiniLM --train train.tsv --validation dev.tsv \
        --test test.tsv
    python experiments/s3t_surviving_page.py --work work

A shard of four slices is trained by S3T with the sequences of a chain cover (B = 6) and with cyclic ones (B = 6 and 4),
and by SISA with as many checkpoints as need at least the bytes of the chain cover's stages. For each of the 15 nonempty
sets of surviving slices the served model is judged on the test set beside plain training: LoRA in the same layers on
exactly the surviving slices, once for the epochs of a stage and once for as many steps as S3T's chain takes in all. All
share the base, the adapters' form and the options of training, which are chosen on a seed of their own by plain
training alone.

SISA's slices are others than S3T's, so a deletion is one of records: one random record of each slice that does not
survive. What SISA keeps depends on the records; its figures are exact expectations over them.

An interrupted run continues in its --work folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Callable, Collection, Sequence
from itertools import combinations, pairwise, takewhile
from pathlib import Path
from typing import Any

import torch
from s3t_tasks import Data, digits, sst2
from successive import once

from pymape.s3t.config import LoraConfig, S3TConfig, StageConfig
from pymape.s3t.ensemble import Chain, Ensemble
from pymape.s3t.frozen_base import base_hash
from pymape.s3t.partition import place
from pymape.s3t.sequences import chain_cover, cyclic_sequences, prefixes
from pymape.s3t.sisa import SisaShard, one_group, split_rows, train_plain, train_sisa
from pymape.s3t.stages import StageKey, encode_row, unpack_stage
from pymape.s3t.training import Rows, StageJob, train_stage
from pymape.storage.runs import environment, quiet_transformers

SLICES = 4
SELECTIONS = {"chain-cover": chain_cover(SLICES), "cyclic-6": cyclic_sequences(SLICES, 6),
              "cyclic-4": cyclic_sequences(SLICES, 4)}  # fmt: skip
SETS = [kept for size in range(SLICES, 0, -1) for kept in combinations(range(SLICES), size)]
CHOICE_SEED = 10

# Layers of a slice, the adapters, and the options of training that are tried.
TASKS: dict[str, dict[str, Any]] = {
    "digits": {
        "layers_per_slice": 2,
        "lora": LoraConfig(r=8, alpha=16.0, targets="all"),
        "stage": StageConfig(batch_size=32),
        "lr": (1e-3, 3e-3, 1e-2),
        "epochs": (5, 10),
    },
    "sst2": {
        "layers_per_slice": 1,
        "lora": LoraConfig(r=8, alpha=16.0, targets="qv"),
        "stage": StageConfig(batch_size=16, max_length=32),
        "lr": (1e-3, 3e-3, 1e-2, 3e-2),
        "epochs": (2, 4, 8),
    },
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in TASKS:
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument("--work", required=True, help="folder of what is done so far, kept")
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        if name == "sst2":
            command.add_argument("--model", required=True, help="folder of a pretrained encoder and its tokenizer")
            command.add_argument("--train", required=True, help="text TAB label lines without a header")
            command.add_argument("--validation", required=True, help="the same; the options are chosen on them")
            command.add_argument("--test", required=True, help="the same; the models are judged on them")
            command.add_argument("--records", type=int, default=320, help="size of the shard")
            command.add_argument("--judged", type=int, default=800, help="validate and test on the first so many")
    return parser.parse_args()


def text(kept: Collection[int]) -> str:
    return "".join(map(str, kept))


def served(sequences: Sequence[tuple[int, ...]], kept: Collection[int]) -> tuple[int, ...]:
    """The slices of the deepest chain whose slices have all survived, of the first one among equally deep ones."""
    return max((tuple(takewhile(kept.__contains__, order)) for order in sequences), key=len)


def settings(task: str, data: Data, seed: int, **changes: Any) -> S3TConfig:
    chosen = TASKS[task]
    return S3TConfig(
        data.model,
        labels=data.labels,
        slices=SLICES,
        layers_per_slice=chosen["layers_per_slice"],
        lora=chosen["lora"],
        stage=dataclasses.replace(chosen["stage"], **changes),
        seed=seed,
    )


def deal(data: Data, seed: int) -> list[Rows]:
    """The shard's slices, to which a keyed hash of the id assigns the records."""
    slices: list[list[tuple[str, bytes]]] = [[] for _ in range(SLICES)]
    for record in data.shard:
        name = record["id"]
        slices[place(seed.to_bytes(32), name, 1, SLICES)[1]].append((name, encode_row(record)))
    return [tuple(rows) for rows in slices]


def union(slices: Sequence[Rows], kept: Collection[int]) -> Rows:
    return tuple(row for part in kept for row in slices[part])


def judge(config: S3TConfig, chains: Sequence[Chain], records: list[dict[str, Any]]) -> list[float]:
    """Accuracy of every chain, in percent, from one pass over the records."""
    found = Ensemble(config.model, config, dict(enumerate(chains))).score(records, batch_size=16)
    return list(found["shard_accuracy"].values())


def tensors(content: bytes) -> dict[str, torch.Tensor]:
    return unpack_stage(content)[0]


def choose(task: str, data: Data, work: Path) -> dict[str, Any]:
    """Options of training by the validation accuracy of plain training on all slices and on one: the best mean."""
    slices, tried = deal(data, CHOICE_SEED), []
    for lr in TASKS[task]["lr"]:
        for epochs in TASKS[task]["epochs"]:
            config = settings(task, data, CHOICE_SEED, lr=lr, epochs=epochs)
            parts = [union(slices, kept) for kept in (range(SLICES), [0])]
            files = [train_plain(config, rows, cache=str(work / "cache")) for rows in parts]
            accuracy = judge(one_group(config), [[tensors(file)] for file in files], data.validation)
            tried.append({"lr": lr, "epochs": epochs, "all": accuracy[0], "one": accuracy[1]})
            print(task, tried[-1], flush=True)
    best = max(tried, key=lambda row: row["all"] + row["one"])
    return {"tried": tried, "lr": best["lr"], "epochs": best["epochs"]}


def train_stages(config: S3TConfig, slices: Sequence[Rows], cache: str) -> dict[tuple[int, ...], bytes]:
    """Every stage of all selections of sequences."""
    base = base_hash(config.model, config.labels)
    files: dict[tuple[int, ...], bytes] = {}
    for prefix in prefixes([order for sequences in SELECTIONS.values() for order in sequences]):
        key, parents = StageKey(0, prefix), [files[prefix[:depth]] for depth in range(1, len(prefix))]
        rows = [slices[part] for part in prefix]
        files[prefix] = train_stage(StageJob.of(config, key, base, rows, parents, cache))
    return files


def lengthen(config: S3TConfig, depth: int) -> S3TConfig:
    """As many epochs of plain training as take the steps of all stages of a chain: 1 + 2 + ... slices' worth."""
    epochs = round(config.stage.epochs * (depth + 1) / 2)
    return dataclasses.replace(config, stage=dataclasses.replace(config.stage, epochs=epochs))


def survival(shard: SisaShard, slices: Sequence[Rows], kept: Collection[int]) -> list[float]:
    """Probability that SISA keeps 0, 1, ... checkpoints when one record of each other slice of S3T is deleted."""
    at_least = [1.0] * (len(shard.checkpoints) + 1)
    for part in set(range(SLICES)) - set(kept):
        depths = [shard.depth([name]) for name, _ in slices[part]]
        at_least = [p * sum(d >= k for d in depths) / len(depths) for k, p in enumerate(at_least)]
    return [one - other for one, other in zip(at_least, [*at_least[1:], 0.0], strict=True)]


def run(task: str, seed: int, data: Data, chosen: dict[str, Any], work: Path) -> dict[str, Any]:
    """Accuracy of every model that any of the methods may serve, and what SISA keeps of each set of slices."""
    config = settings(task, data, seed, lr=chosen["lr"], epochs=chosen["epochs"])
    single, slices, cache = one_group(config), deal(data, seed), str(work / "cache")
    clock = [time.process_time()]
    stages = train_stages(config, slices, cache)
    clock.append(time.process_time())
    plain = [train_plain(config, union(slices, kept), cache=cache) for kept in SETS]
    longer = [train_plain(lengthen(config, len(kept)), union(slices, kept), cache=cache) for kept in SETS]
    clock.append(time.process_time())
    stored = {
        name: sum(len(stages[prefix]) for prefix in prefixes(sequences)) for name, sequences in SELECTIONS.items()
    }
    checkpoints = math.ceil(stored["chain-cover"] / len(plain[0]))
    shard = train_sisa(config, split_rows(union(slices, range(SLICES)), checkpoints, seed), cache=cache)
    clock.append(time.process_time())

    chains = [[tensors(stages[prefix[:depth]]) for depth in range(1, len(prefix) + 1)] for prefix in stages]
    of_stages = judge(config, chains, data.test)
    of_plain, of_longer, of_sisa = (
        judge(single, [[tensors(content)] for content in files], data.test)
        for files in (plain, longer, shard.checkpoints)
    )
    labels = [record["labels"] for record in data.shard]
    majority = max(range(data.labels), key=labels.count)
    found = {
        "slices": [len(rows) for rows in slices],
        "majority": 100 * sum(record["labels"] == majority for record in data.test) / len(data.test),
        "test": len(data.test),
        "stages": {text(prefix): accuracy for prefix, accuracy in zip(stages, of_stages, strict=True)},
        "plain": {text(kept): accuracy for kept, accuracy in zip(SETS, of_plain, strict=True)},
        "longer": {text(kept): accuracy for kept, accuracy in zip(SETS, of_longer, strict=True)},
        "sisa": of_sisa,
        "survival": {text(kept): survival(shard, slices, kept) for kept in SETS},
        "bytes": stored | {"SISA": shard.size},
        "cpu_seconds": dict(zip(("S3T", "plain, both", "SISA"), (b - a for a, b in pairwise(clock)), strict=True)),
    }
    print(task, seed, found, flush=True)
    return found


def run_task(task: str, load: Callable[[int], Data], seeds: Sequence[int], begun: dict[str, Any], work: Path) -> None:
    """Run what is not done yet."""
    shown = {"layers_per_slice": TASKS[task]["layers_per_slice"], "lora": dataclasses.asdict(TASKS[task]["lora"])}
    facts = {name: value for name, value in environment().items() if name != "command"}
    before = once(work / f"{task}.json", lambda: {"settings": begun, **shown, "facts": facts})
    if before["settings"] != begun:
        raise SystemExit(f"work must be new, or that of a run with these settings, got one with {before['settings']}")
    with quiet_transformers():
        chosen = once(work / f"{task}-choice.json", lambda: choose(task, load(CHOICE_SEED), work))
        for seed in seeds:
            once(work / f"{task}-{seed}.json", lambda: run(task, seed, load(seed), chosen, work))  # noqa: B023


def main() -> None:
    arguments = options()
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # as the stages are trained
    begun = {name: value for name, value in vars(arguments).items() if name not in ("command", "work", "seeds")}
    begun |= {name: os.path.basename(value) for name, value in begun.items() if isinstance(value, str)}
    if arguments.command == "sst2":
        files = (arguments.model, arguments.train, arguments.validation, arguments.test)
        load = sst2(*files, records=arguments.records, judged=arguments.judged)
    else:
        load = lambda seed: digits(seed, work)  # noqa: E731
    run_task(arguments.command, load, arguments.seeds, begun, work)


if __name__ == "__main__":
    main()
