"""Processes that share the parts of an experiment: what they leave when they are ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pymape.experiments.workers import share_out
from pymape.storage.files import atomic_write


def write_slowly(folder: Path, names: Iterator[str], look: Callable[[], None]) -> None:
    for name in names:
        with atomic_write(folder / name) as temporary:
            temporary.write_text("half")
            time.sleep(60)


def test_workers_that_are_ended_leave_nothing_half_written(tmp_path: Path) -> None:
    def look() -> None:
        if len(list(tmp_path.iterdir())) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        share_out(partial(write_slowly, tmp_path), ["a", "b"], 2, look)
    assert not list(tmp_path.iterdir())
