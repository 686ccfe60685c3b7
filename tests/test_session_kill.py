"""Sessions that are killed lose no finished request and go on to the same weights."""

from __future__ import annotations

import functools
from pathlib import Path

import kill_tools
import pytest

harness = functools.partial(kill_tools.harness, "kill_harness.py")


def test_killed_at_every_named_step(tmp_path: Path) -> None:
    found = harness(tmp_path, "named")
    assert found["wrong"] == []
    assert found["kills"] == 8


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
    assert found["in creation"] > 0
