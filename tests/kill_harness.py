"""Kills sessions (SIGKILL) and checks what is left: `python kill_harness.py FOLDER random KILLS SEED` or `... named`.

The parent imports everything and runs one session without interruption; every other session runs in children forked
from it, so that a kill costs a fraction of a second. A child dies just before a chosen file operation in the session's
folder (an audit hook counts them), or when the parent kills it after a random time. After every kill the session is
opened again and must be whole; it is then resumed until all requests are met, by the weights of the reference.
Prints one JSON object: what was done, and a line for everything that was wrong.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from session_tools import REQUESTS, options, write_files

from pymape.session import UnlearnSession, weights_hash
from pymape.storage.store import FolderStore

# Place of a kill -> (the file operation that is not reached, whether the first request is finished then).
NAMED: dict[str, tuple[Callable[[str, str], bool], bool]] = {
    "the stage is empty": (lambda event, path: event == "open" and path.startswith(".stage/"), False),
    "the model is half written": (lambda event, path: path.startswith(".stage/model/tokenizer"), False),
    "the receipt is missing": (lambda event, path: path.startswith(".stage/.receipt.json"), False),
    "the stage is complete": (lambda event, path: event == "os.rename" and path == ".stage", False),
    "the step is in place": (lambda event, path: event == "open" and path.startswith(".state.json"), False),
    "the state is written": (lambda event, path: event == "os.rename" and path.startswith(".state.json"), False),
    "the request is committed": (lambda event, path: event == "os.remove" and path.startswith(".state.json"), True),
    "old weights are half removed": (
        lambda event, path: event == "os.remove" and path == "step-0000/model/config.json",
        True,
    ),
}
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")
Die = Callable[[str, str], bool]


def work(
    folder: Path, files: Path, report: Callable[[str], None] = lambda request: None, most: int = len(REQUESTS)
) -> None:
    """Meet all requests, or the first few, continuing whatever session is there."""
    there = (folder / "state.json").exists()
    with UnlearnSession(folder) if there else UnlearnSession.create(folder, options(files)) as session:
        for request, ids in [*REQUESTS.items()][:most]:
            session.request(request, ids)
            report(request)


def watch(folder: Path, die: Die) -> None:
    """Kill this process just before the file operation in the folder that `die` asks for."""
    prefix = f"{folder}/"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        ours = event in _EVENTS and str(arguments[0]).startswith(prefix)
        if ours and die(event, str(arguments[0]).removeprefix(prefix)):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_child(folder: Path, files: Path, die: Die | None, delay: float | None) -> tuple[bool, list[str]]:
    """Work in a forked child; whether it was killed, and the requests it reported as finished."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            if die is not None:
                watch(folder, die)
            work(folder, files, lambda request: os.write(write, f"{request}\n".encode()) and None)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read) as pipe:
        reported = pipe.read().split()
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError("the child failed")
    return os.WIFSIGNALED(status), reported


def check(folder: Path, reported: list[str], reference: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Open the session, which rolls back; the number of its receipts, and all that is wrong."""
    if not (folder / "state.json").exists():
        return 0, [f"lost receipts of {reported}"] if reported else []
    before = [receipt["request"] for receipt in UnlearnSession(folder, read_only=True).receipts]
    with UnlearnSession(folder) as session:
        receipts = session.receipts
        weights = weights_hash(session.model_folder)
    wrong = []
    names = [receipt["request"] for receipt in receipts]
    if names != before or names != list(REQUESTS)[: len(names)] or not set(reported) <= set(names):
        wrong.append(f"receipts of {names} after {reported} were reported and {before} were there")
    for found, expected in zip(receipts, reference, strict=False):
        for field in ("weights_sha256", "previous_weights_sha256", "records", "metrics"):
            if found[field] != expected[field]:
                wrong.append(f"{field} of {found['request']} is {found[field]}, not {expected[field]}")
    if weights != (reference[len(names) - 1]["weights_sha256"] if names else reference[0]["previous_weights_sha256"]):
        wrong.append(f"weights after {names} are {weights[:12]}")
    store = FolderStore(folder, "session", "read")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if there != {*store.files, "state.json", ".lock"}:
        wrong.append(f"files left over or missing: {sorted(there ^ {*store.files, 'state.json', '.lock'})}")
    return len(names), wrong


def kill_at_names(folder: Path, files: Path, base: Path, reference: list[dict[str, Any]]) -> list[str]:
    """Kill a session in its first request at every named place."""
    wrong = []
    for place, (reached, finished) in NAMED.items():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        killed, reported = run_child(folder, files, reached, None)
        count, found = check(folder, reported, reference)
        if not killed or count != finished:
            found.append(f"killed: {killed}, {count} requests finished")
        work(folder, files, most=1)
        count, later = check(folder, [*REQUESTS][:1], reference)
        wrong += [f"{place}: {line}" for line in found + later]
    return wrong


def kill_at_random(
    folder: Path, files: Path, kills: int, seed: int, operations: int, seconds: float, reference: list[dict[str, Any]]
) -> tuple[dict[str, int], list[str]]:
    """Kill sessions at random file operations and at random times, in turn."""
    draw, wrong, done = random.Random(seed), [], {"kills": 0, "sessions": 0, "in creation": 0}
    finished = len(REQUESTS)
    while done["kills"] < kills:
        if finished == len(REQUESTS):
            shutil.rmtree(folder, ignore_errors=True)
            done["sessions"] += 1
            finished = 0
        share = (len(REQUESTS) + 1 - finished) / (len(REQUESTS) + 1)
        left = draw.randint(1, round(operations * share))

        def die(event: str, path: str) -> bool:
            nonlocal left
            left -= 1
            return left == 0

        timed = done["kills"] % 2 == 1
        killed, reported = run_child(
            folder, files, None if timed else die, draw.uniform(0, seconds * share) if timed else None
        )
        finished, found = check(folder, reported, reference)
        wrong += [f"kill {done['kills']}, {'timed' if timed else 'at an operation'}: {line}" for line in found]
        done["kills"] += killed
        done["in creation"] += killed and not (folder / "state.json").exists()
    run_child(folder, files, None, None)
    finished, found = check(folder, list(REQUESTS), reference)
    return done, wrong + found


def main(place: str, mode: str, kills: str = "0", seed: str = "0") -> None:
    files = Path(place).resolve()
    write_files(files)
    folder, base = files / "killed", files / "base"
    UnlearnSession.create(base, options(files)).close()
    counted, ends = 0, []

    def count(event: str, path: str) -> bool:
        nonlocal counted
        counted += 1
        return False

    watch(folder, count)
    work(folder, files, lambda request: ends.append(time.perf_counter()))
    operations = counted
    reference = UnlearnSession(folder, read_only=True).receipts
    _, wrong = check(folder, list(REQUESTS), reference)
    seconds = (ends[-1] - ends[0]) / (len(REQUESTS) - 1)
    done = {"kills": len(NAMED)}
    if mode == "named":
        wrong += kill_at_names(folder, files, base, reference)
    else:
        done, more = kill_at_random(
            folder, files, int(kills), int(seed), operations, seconds * (len(REQUESTS) + 1), reference
        )
        wrong += more
    print(json.dumps({**done, "file operations": operations, "seconds a request": round(seconds, 2), "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
