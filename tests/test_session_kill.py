"""Sessions that are killed lose no finished request and go on to the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def harness(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the kill harness in a process of its own: one that can be forked safely."""
    here = Path(__file__).parent
    command = [sys.executable, str(here / "kill_harness.py"), str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=3600)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


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
