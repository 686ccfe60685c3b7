"""Ledgers that are killed lose no acknowledged request, serve no tombstoned stage and leave nothing half erased."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import kill_tools
import pytest

harness = functools.partial(kill_tools.harness, "s3t_kill_harness.py")


def test_killed_at_every_checkpoint(tmp_path: Path) -> None:
    found = harness(tmp_path, "named")
    assert found["wrong"] == []
    assert found["kills"] == found["names"] > 30


def test_killed_at_random(tmp_path: Path) -> None:
    found = harness(tmp_path, "random", "10", "1")
    assert found["wrong"] == []
    assert found["kills"] == 10


@pytest.mark.soak
def test_killed_at_random_many_times(tmp_path: Path) -> None:
    found = harness(tmp_path, "random", "200", "2")
    print(found)
    assert found["wrong"] == []
    assert found["kills"] == 200


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_killed_at_system_calls(tmp_path: Path) -> None:
    found = harness(tmp_path, "syscalls", "100", "3")
    print(found)
    assert found["wrong"] == []
    assert found["kills"] == 100
