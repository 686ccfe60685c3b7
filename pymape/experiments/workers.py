"""The processes between which the parts of an experiment are shared out."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pymape.storage.runs import quiet_transformers

__all__ = ["share_out"]

Work = Callable[[Iterator[Any], Callable[[], None]], None]

_POLL = 0.5  # seconds between two looks at how far the processes are


def share_out(work: Work, parts: Sequence[Any], workers: int, look: Callable[[], None]) -> None:
    """Do some work part by part, on one thread a process: the models are too small to gain from more.

    Args:
        work: takes an iterator of parts, and what to call after each piece of progress; a function that can be pickled.
        parts: what is shared out, one by one.
        workers: processes; with 1 the work is done in this one.
        look: called whenever there may be progress to show.

    Raises:
        ValueError: a process failed; the others are ended then.
    """
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            work(iter(parts), look)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    queue, failures = context.Queue(), context.SimpleQueue()
    for part in [*parts, *[None] * workers]:
        queue.put(part)
    processes = [context.Process(target=_worker, args=(work, queue, failures), daemon=True) for _ in range(workers)]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(_POLL)
            look()
            if not failures.empty():
                raise ValueError(failures.get())
            broken = [process.exitcode for process in processes if process.exitcode]
            if broken:
                raise ValueError(f"workers must end by themselves, got exit code {broken[0]}")
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()


def _worker(work: Work, queue: Any, failures: Any) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `finally` clears away what is half-written
    try:
        with quiet_transformers():
            work(iter(queue.get, None), lambda: None)
    except KeyboardInterrupt:  # of the terminal, which the first process tells, or of `share_out`
        return
    except Exception as error:
        failures.put(f"a worker must succeed, got {type(error).__name__}: {error}")
