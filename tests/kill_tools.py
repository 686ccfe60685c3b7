"""Running a kill harness from a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def harness(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a kill harness in a process of its own: one that can be forked safely."""
    here = Path(__file__).parent
    command = [sys.executable, str(here / script), str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=3600)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found
