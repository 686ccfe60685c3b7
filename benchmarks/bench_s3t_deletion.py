"""Deletion requests on an S3T ledger: time until one is acknowledged durably, and a long run in batches to the end.

The ledger does not train, so the stages are small made-up files. Everything else is real: records, tombstones, commits,
erasure of files, database rows and log, verification.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Case, Report
from pymape.s3t.ledger import Ledger, RecordRow, StageRow
from pymape.s3t.partition import place, record_name
from pymape.s3t.stages import Provenance, encode_row, pack_stage

DEVICE = "cpu"
SHARDS, SLICES, TOKENS = 5, 8, 64
CYCLIC = [tuple((first + step) % SLICES for step in range(SLICES)) for first in range(SLICES)]  # B = 8
BASE = CONFIG = "0" * 64
BATCH = 100
_SYNCS = ("fsync", "fdatasync")


def add_options(parser: argparse.ArgumentParser, device: str) -> None:
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=8, help="in which all stages are live before 100 requests")
    parser.add_argument("--folder", help="where to work; default: a temporary folder")


def run(report: Report, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    shape = f"{options.records:,} records, m={SHARDS}, L={SLICES}, B={len(CYCLIC)}"
    batches, rounds = options.requests // BATCH, options.rounds
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        whole = Path(place) / "ledger"
        with make_ledger(whole, options.records) as ledger:
            stages, size = len(ledger.stages()), ledger.stages()[0].size
        with _copy(whole) as folder:
            report.add(acknowledge(shape, folder, rounds))
        with _copy(whole) as folder:
            syncs = count_syncs(folder, batches)
        with _copy(whole) as folder:
            case = run_batches(f"{options.requests:,} requests to the end", shape, folder, batches)
            case.figures |= {} if syncs is None else {"syncs": syncs}
            report.add([case])
        with _copy(whole) as folder:
            report.add([run_batches("repaired before each batch", shape, folder, rounds, repaired=True)])
    report.notes += [
        f"a record: {TOKENS} tokens; a request: one record; {stages} stages of {size:,} bytes; synchronous=FULL",
        f"acknowledge: `tombstone` of one request, {rounds} rounds of {BATCH}, all stages live before each round",
        f"to the end: `tombstone` and `finish` (switched, erased, verified) of {BATCH} requests, times of batches",
        f"repaired before each batch: {rounds} batches, so that every batch finds {stages} stages to end",
        f"syncs: fsync and fdatasync of all {options.requests:,} requests with opening and closing, counted by strace",
    ]


def make_ledger(folder: Path, records: int) -> Ledger:
    """A ledger with all stages trained."""
    ledger = Ledger.create(folder, {}, BASE, [CYCLIC] * SHARDS)
    ledger.add_records(make_rows(ledger.key, records))
    ledger.plan()
    land_all(ledger)
    return ledger


def make_rows(key: bytes, records: int) -> Iterator[RecordRow]:
    generator = torch.Generator().manual_seed(0)
    for number in range(records):
        ids = torch.randint(0, 30_000, (TOKENS,), generator=generator)
        content = encode_row({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": number % 2})
        shard, part = place(key, str(number), SHARDS, SLICES)
        yield RecordRow.of(record_name(key, str(number)), None, shard, part, content)


def land_all(ledger: Ledger) -> None:
    while rows := ledger.runnable():
        for row in rows:
            ledger.land(row.key, make_stage(ledger, row))


def make_stage(ledger: Ledger, row: StageRow) -> bytes:
    parents = ledger.chain(row.key)[:-1]
    digests = {part: ledger.slice_digest(row.key.shard, part) for part in row.key.prefix}
    parent = parents[-1].sha256 if parents else None
    return pack_stage({"lora": torch.zeros(1024)}, Provenance(row.key, BASE, CONFIG, row.stage, parent, digests))


def acknowledge(shape: str, folder: Path, rounds: int) -> list[Case]:
    """Single requests, until most slices are dead; then everything is repaired, which is not timed."""
    ending, others = [], []
    with Ledger(folder) as ledger:
        names = draw_names(ledger, rounds * BATCH)
        for start in range(0, len(names), BATCH):
            for number in range(start, start + BATCH):
                begin = time.perf_counter()
                receipt = ledger.tombstone([(f"request {number}", [names[number]])])[0]
                (ending if receipt["stages"] else others).append(time.perf_counter() - begin)
            ledger.finish()
            ledger.repair()
            land_all(ledger)
        check(ledger)
    kinds = {"acknowledge": ending + others, "acknowledge, those that end stages": ending}
    return [_case(shape, kind, times) for kind, times in kinds.items()]


def run_batches(name: str, shape: str, folder: Path, batches: int, *, repaired: bool = False) -> Case:
    times = meet(folder, batches, repaired)
    with Ledger(folder) as ledger:
        check(ledger)
    case = _case(shape, name, times)
    case.figures |= {"total s": sum(times), "requests/s": BATCH * batches / sum(times)}
    return case


def meet(folder: Path, batches: int, repaired: bool = False) -> list[float]:
    """Seconds of every batch, each met to the end."""
    times = []
    with Ledger(folder) as ledger:
        names = draw_names(ledger, BATCH * batches)
        for start in range(0, len(names), BATCH):
            if repaired:
                ledger.repair()
                land_all(ledger)
            begin = time.perf_counter()
            ledger.tombstone([(f"request {number}", [names[number]]) for number in range(start, start + BATCH)])
            ledger.finish()
            times.append(time.perf_counter() - begin)
    return times


def count_syncs(folder: Path, batches: int) -> int | None:
    """Calls of fsync and fdatasync of a run in a process of its own; None without strace."""
    if shutil.which("strace") is None:
        return None
    command = ["strace", "-f", "-c", "-e", f"trace={','.join(_SYNCS)}", sys.executable, "-m", __name__]
    result = subprocess.run([*command, str(folder), str(batches)], capture_output=True, text=True, check=True)
    rows = [line.split() for line in result.stderr.splitlines() if re.search(rf"\b({'|'.join(_SYNCS)})$", line)]
    return sum(int(row[3]) for row in rows)


def draw_names(ledger: Ledger, count: int) -> list[str]:
    names = [name for shard in range(SHARDS) for name, _ in ledger.records(shard, range(SLICES))]
    return random.Random(0).sample(sorted(names), count)


def check(ledger: Ledger) -> None:
    """Every request is verified, and nothing is wrong with the ledger."""
    report = ledger.verify()
    assert report["ok"], report["problems"]
    assert {receipt["state"] for receipt in ledger.requests()} == {"verified"}


@contextmanager
def _copy(folder: Path) -> Iterator[Path]:
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    os.sync()
    yield copy
    shutil.rmtree(copy)


def _case(shape: str, provider: str, times: Sequence[float]) -> Case:
    median, low, high, last = (float(np.percentile(times, q)) for q in (50, 20, 80, 99))
    return Case(shape, provider, median, low, high, {"p99 ms": 1e3 * last, "max ms": 1e3 * max(times)})


if __name__ == "__main__":
    meet(Path(sys.argv[1]), int(sys.argv[2]))
