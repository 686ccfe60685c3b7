"""The life of a small S3T system, which the kill harness interrupts: `live` leads it from wherever it is to its end."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from s3t_ledger_tools import BASE, make_rows, make_stage, name_of

from pymape.prefix_cache import PrefixCache
from pymape.s3t.ledger import Ledger
from pymape.s3t.ledger.folder import CACHE
from pymape.storage.store import file_hash

KEY = bytes(range(32))  # all lives have the same names
CYCLIC = [(0, 1, 2), (2, 0, 1), (1, 2, 0)]
RECORDS = 36  # by threes in the 6 slices of 2 shards
FIRST = [[("a1", [0]), ("a2", [3, 4])], [("a3", [1, 2])], [("a4", [9])]]  # batches of (request, numbers of records)
SECOND = [[("b1", [12])], [("b2", [18, 30]), ("b3", [5])], [("b4", [10])]]
LAST = [[("c1", [35])]]
BATCHES = FIRST + SECOND + LAST
PARTIAL = ".partial"  # the suffix that says that all in an export's folder is the ledger's
ACKNOWLEDGED = [request for batch in BATCHES for request, _ in batch]
Report = Callable[[str], Any]


def live(folder: Path, export: Path, report: Report = lambda request: None) -> None:
    """Lead a life from wherever it is to its end."""
    there = (folder / "ledger.sqlite").exists()
    late, away = export.with_name("late"), export.with_name("away")  # on a disk that is not there for a while
    with (
        Ledger(folder, accept_lost_anchor=True) if there else Ledger.create(folder, {}, BASE, [CYCLIC] * 2, KEY) as book
    ):
        if not sum(map(sum, book.counts())) + book.deleted:
            book.add_records(make_rows(book, RECORDS))
        book.plan()
        known = {receipt["request"] for receipt in book.requests()}
        with landing(book):
            delete(book, FIRST, report)
        if "b1" not in known:
            book.repair()
        with landing(book):
            delete(book, SECOND, report)
        if "c1" not in known:
            book.repair()
            with landing(book):
                pass
            write_export(book, export)
            shutil.rmtree(away, ignore_errors=True)
            write_export(book, late)
            late.rename(away)
        delete(book, LAST, report)
        if away.exists():
            away.rename(late)
            book.finish()
    (folder / "audit.head").unlink()
    Ledger(folder, accept_lost_anchor=True).close()


def delete(book: Ledger, batches: list[list[tuple[str, list[int]]]], report: Report) -> None:
    for batch in batches:
        book.tombstone([(request, [name_of(book, number) for number in numbers]) for request, numbers in batch])
        for request, _ in batch:
            report(request)
        book.finish()


@contextlib.contextmanager
def landing(book: Ledger) -> Iterator[None]:
    """Land stages in another thread while the block runs, and afterwards those that are left."""
    over, errors = threading.Event(), []

    def land() -> None:
        cache = PrefixCache(book.folder / CACHE)
        try:
            while True:
                last = over.is_set()
                rows = book.runnable()
                for row in rows:
                    for name, _ in book.records(row.key.shard, row.key.prefix):
                        cache.put("prefix", name, "inputs", torch.zeros(4))
                    book.land(row.key, make_stage(book, row))
                if last and not rows:
                    return
                over.wait(0.001)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=land)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if errors:
        raise errors[0]


def write_export(book: Ledger, export: Path) -> None:
    """As `export_ensemble` does, in the order of its steps: begin, write, place."""
    chain = book.serving()[1]
    keys, partial = [row.key for row in chain], export.with_suffix(PARTIAL)
    with book.exporting(partial, keys):
        partial.mkdir()
        for row in chain:
            (partial / f"{row.key.name}.safetensors").write_bytes(book.read_stage(row))
        files = [{"file": path.name, "sha256": file_hash(path)} for path in sorted(partial.iterdir())]
        with book.placing(export, files, keys):
            shutil.rmtree(export, ignore_errors=True)  # of a life that was interrupted after this
            partial.rename(export)


def state_of(book: Ledger) -> dict[str, Any]:
    """What the end of every life must agree in."""
    return {
        "stages": sorted((row.key.name, row.state, row.sha256) for row in book.stages()),
        "serving": [[row.key.name for row in chain] for chain in book.serving()],
        "counts": book.counts(),
        "requests": sorted((receipt["request"], receipt["records"], receipt["state"]) for receipt in book.requests()),
        "exports": [(entry["request"], sorted(entry["outcome"])) for entry in book.exports()],
    }
