"""Kills S3T ledgers (SIGKILL) and checks what is left: `python s3t_kill_harness.py FOLDER MODE [KILLS SEED]`.

The load is the life of a small system: creation, ingest, deletions by one thread while another lands stages and caches
states, repair, exports and their revocation, one of them late, and an anchor that is lost. The parent imports
everything and lives it once without interruption; every other life is led by children forked from it, each of which
dies and leaves the rest to the next one:

  named     at every `faults.checkpoint` of the package
  random    at a random checkpoint, at a random file operation (counted by an audit hook), or after a random time
  syscalls  in the middle of a commit: at a random system call that writes, syncs or deletes (needs strace)

After every kill the ledger is looked at as it lies there, and then opened, which finishes all requests; at the end of a
life it must hold what the uninterrupted one holds. Prints one JSON object: what was done, and all that was wrong.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1"}

from s3t_ledger_tools import name_of
from s3t_life import ACKNOWLEDGED, BATCHES, PARTIAL, live, state_of

from pymape.prefix_cache import PrefixCache
from pymape.s3t import faults
from pymape.s3t.ledger import Ledger
from pymape.s3t.ledger.folder import CACHE

SYSCALLS = ("pwrite64", "write", "fsync", "fdatasync", "ftruncate", "unlink", "rename", "openat")
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree")
_KEPT = {"ledger.sqlite", "key", "lock", "audit.head", "stages", "cache"}


def run_child(folder: Path, arm: Callable[[], None], watch: Callable[[int], Any]) -> tuple[bool, list[str]]:
    """Live on in a forked child; whether it was killed, and the requests it reported as accepted.

    Args:
        folder: with the system and its export.
        arm: run by the child before it begins; makes it die.
        watch: run by the parent with the child's process id, before the child begins; returns what ends the watching.
    """
    read, write = os.pipe()
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            os.close(go)
            os.read(wait, 1)
            arm()
            live(folder / "system", folder / "export", lambda request: os.write(write, f"{request}\n".encode()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    os.close(wait)
    end = watch(child)
    os.close(go)
    with os.fdopen(read) as pipe:
        reported = pipe.read().split()
    status = os.waitpid(child, 0)[1]
    end()
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError("the child failed")
    return os.WIFSIGNALED(status), reported


def at_checkpoint(folder: Path, matches: Callable[[str], bool], hit: int = 1) -> tuple[bool, list[str]]:
    """A child that dies at the given hit of a checkpoint."""
    left = hit

    def checkpoint(name: str) -> None:
        nonlocal left
        if matches(name):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def arm() -> None:
        faults.checkpoint = checkpoint

    return run_child(folder, arm, _nobody)


def at_operation(folder: Path, operation: int) -> tuple[bool, list[str]]:
    """A child that dies just before a file operation in the folder."""
    left = operation

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in _EVENTS and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return run_child(folder, lambda: sys.addaudithook(hook), _nobody)


def after_time(folder: Path, seconds: float) -> tuple[bool, list[str]]:
    """A child that is killed after a time."""

    def watch(child: int) -> Callable[[], None]:
        timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
        timer.start()
        return timer.cancel

    return run_child(folder, lambda: None, watch)


def at_syscall(folder: Path, syscall: str, number: int) -> tuple[bool, list[str]]:
    """A child that strace kills at a system call of one of its threads."""

    def watch(child: int) -> Callable[[], Any]:
        inject = f"inject={syscall}:signal=KILL:when={number}"
        command = ["strace", "-f", "-p", str(child), "-e", f"trace={syscall}", "-e", inject, "-o", "/dev/null"]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
        assert tracer.stderr is not None
        if not select.select([tracer.stderr], [], [], 10)[0] or b"attached" not in tracer.stderr.readline():
            raise RuntimeError("strace must be allowed to attach to a process")
        return tracer.communicate

    return run_child(folder, lambda: None, watch)


def look(folder: Path, reported: list[str]) -> list[str]:
    """What is wrong with a ledger as it lies there, before anything is repaired."""
    system = folder / "system"
    if not (system / "ledger.sqlite").exists():
        return [f"lost {reported}"] if reported else []
    book = Ledger(system, "read")
    try:
        requests = {receipt["request"]: receipt for receipt in book.requests()}
        wrong = [f"lost {request}" for request in reported if request not in requests]
        gone = {name for receipt in requests.values() for shard in receipt["shards"] for name in shard["stages"]}
        served = [row for chain in book.serving() for row in chain]
        wrong += [f"serves {row.key.name}" for row in served if row.key.name in gone or row.state != "trained"]
        for row in served:
            book.read_stage(row)
        for receipt in requests.values():
            if receipt["state"] in ("erased", "verified"):
                names = [name for shard in receipt["shards"] for name in shard["stages"]]
                wrong += [f"half erased: {name}" for name in names if (system / f"stages/{name}.safetensors").exists()]
        return wrong
    finally:
        book.close()


def check(folder: Path) -> tuple[bool, list[str]]:
    """Open a ledger, which finishes all requests; whether its life is over, and all that is wrong."""
    system = folder / "system"
    if not (system / "ledger.sqlite").exists():
        return False, []
    with Ledger(system, accept_lost_anchor=True) as book:
        report = book.verify()
        wrong = [*report["problems"]]
        states = {receipt["request"]: receipt["state"] for receipt in book.requests()}
        wrong += [f"{request} is {state}" for request, state in states.items() if state != "verified"]
        wrong += [
            f"{count} stages are {state}" for state, count in book.stage_counts().items() if state == "tombstoned"
        ]
        for request, numbers in (entry for batch in BATCHES for entry in batch):
            found = book.locate([name_of(book, number) for number in numbers]).values()
            by = {record.request for record in found}
            wrong += (
                [f"records of {request} are those of {by}"]
                if found and by != {request if request in states else None}
                else []
            )
        deleted = [name_of(book, n) for batch in BATCHES for r, numbers in batch if r in states for n in numbers]
        erased = PrefixCache(system / CACHE).erase(deleted)
        wrong += [f"{erased} cached states of deleted records"] if erased else []
    wrong += [f"left over: {path.name}" for path in system.iterdir() if path.name not in _KEPT]
    wrong += [f"half written: {path.name}" for path in folder.glob(f"*{PARTIAL}")]
    over = "c1" in states
    if over:
        wrong += [f"the export {name!r} is there" for name in ("export", "late") if (folder / name).exists()]
    return over, wrong


def compare(folder: Path, reference: dict[str, Any]) -> list[str]:
    """How the end of a life differs from that of the uninterrupted one."""
    with Ledger(folder / "system", accept_lost_anchor=True) as book:
        state = state_of(book)
    return [f"{name} is {state[name]}, not {value}" for name, value in reference.items() if state[name] != value]


def names_in_source() -> set[str]:
    """Every name that the package gives to `faults.checkpoint`."""
    text = "".join(path.read_text() for path in sorted(Path(faults.__file__).parent.rglob("*.py")))
    names = set(re.findall(r'faults\.checkpoint\("([^"]+)"\)', text))
    for transaction in re.findall(r'(?:_change|transaction)\("([^"]+)"\)', text):
        names |= {f"{transaction}: commit", f"{transaction}: committed"}
    return names


def kill_at_names(folder: Path, names: list[str], reference: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    done, wrong = {"kills": 0, "lives": 1}, []
    for name in names:
        killed, reported = at_checkpoint(folder, name.__eq__)
        if not killed:  # it lies behind this life
            wrong += [f"before {name}: {line}" for line in compare(folder, reference)]
            _clear(folder)
            done["lives"] += 1
            killed, reported = at_checkpoint(folder, name.__eq__)
        _, found = check_all(folder, reported)
        wrong += [f"{name}: {line}" for line in ([] if killed else ["not killed"]) + found]
        done["kills"] += killed
    run_child(folder, lambda: None, _nobody)
    return done, wrong + check(folder)[1] + compare(folder, reference)


def check_all(folder: Path, reported: list[str]) -> tuple[bool, list[str]]:
    found = look(folder, reported)
    over, more = check(folder)
    return over, found + more


def kill_at_random(
    folder: Path, kills: int, seed: int, counts: dict[str, float], reference: dict[str, Any], syscalls: bool
) -> tuple[dict[str, int], list[str]]:
    draw, wrong = random.Random(seed), []
    done = Counter(kills=0, lives=1)
    acknowledged: list[str] = []
    while done["kills"] < kills:
        # A life that is interrupted often is shorter each time.
        share = 1 - len(acknowledged) / (len(ACKNOWLEDGED) + 1)
        kind = "syscalls" if syscalls else draw.choice(["checkpoints", "operations", "seconds"])
        if kind == "checkpoints":
            killed, reported = at_checkpoint(folder, lambda name: True, draw.randint(1, round(counts[kind] * share)))
        elif kind == "operations":
            killed, reported = at_operation(folder, draw.randint(1, round(counts[kind] * share)))
        elif kind == "seconds":
            killed, reported = after_time(folder, draw.uniform(0, counts[kind] * share))
        else:
            killed, reported = at_syscall(folder, draw.choice(SYSCALLS), round(300 ** draw.random()))
        done[f"at {kind}"] += killed
        done["kills"] += killed
        acknowledged += [request for request in reported if request not in acknowledged]
        found = look(folder, acknowledged)
        # Every other time the next child recovers the ledger, and may die over it.
        over = not killed
        if over or draw.random() < 0.5:
            over, more = check(folder)
            found += more
        if not killed:
            found += compare(folder, reference)
        wrong += [f"kill {done['kills']}, {kind}: {line}" for line in found]
        if not killed:
            _clear(folder)
            done["lives"] += 1
            acknowledged = []
    run_child(folder, lambda: None, _nobody)
    return dict(done), wrong + check(folder)[1] + compare(folder, reference)


def main(place: str, mode: str, kills: str = "0", seed: str = "0") -> None:
    folder = Path(place).resolve() / "life"
    folder.mkdir(parents=True)
    names: Counter[str] = Counter()
    operations = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal operations
        operations += event in _EVENTS and str(arguments[0]).startswith(str(folder))

    sys.addaudithook(hook)
    faults.checkpoint = lambda name: names.update([name])
    begin = time.perf_counter()
    live(folder / "system", folder / "export")
    seconds = time.perf_counter() - begin
    faults.checkpoint = lambda name: None
    counts = {"checkpoints": names.total(), "operations": operations, "seconds": seconds}
    over, wrong = check_all(folder, ACKNOWLEDGED)
    with Ledger(folder / "system") as book:
        reference = state_of(book)
    wrong += [] if over else ["the reference did not end"]
    wrong += [f"never reached: {name}" for name in names_in_source() - names.keys()]
    _clear(folder)
    if mode == "named":
        done, found = kill_at_names(folder, [*names], reference)
    else:
        done, found = kill_at_random(folder, int(kills), int(seed), counts, reference, mode == "syscalls")
    print(json.dumps({**done, "names": len(names), **counts, "wrong": wrong + found}))


def _clear(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _nobody(child: int) -> Callable[[], None]:
    return lambda: None


if __name__ == "__main__":
    main(*sys.argv[1:])
