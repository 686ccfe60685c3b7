"""Build the wheel with build isolation and try it in an empty environment: no source tree, no compiler.

Run by `make wheel-test`. The empty environment takes torch and the rest from the environment that runs this script, so
that only pymape itself is new there.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CHECK = """
import sys
import torch
import pymape
assert "transformers" not in sys.modules and "triton" not in sys.modules and "matplotlib" not in sys.modules
from pymape import _C, ops
here = pymape.__file__
assert "site-packages" in here, here
import pymape.kernels, importlib.util
assert importlib.util.find_spec("kernels") is None, "the wheel must not install a top-level package `kernels`"
x = torch.randn(2, 5, 3)
torch.testing.assert_close(ops.module_scores(x, x), (x * x).sum(1))
from transformers import BertConfig, BertForSequenceClassification
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
model = BertForSequenceClassification(config).eval()
rows = [{"input_ids": list(range(1, n)), "labels": n % 2} for n in range(3, 9)]
scores = pymape.importance(model, rows, progress=False)
masks = pymape.search(forget=scores.select(scores.ids[:2]), retain=scores.select(scores.ids[2:]), budget=0.3)
print(masks.summary())
print("wheel works:", here)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        source = base / "source"  # a copy without build products: what a user's `pip install .` sees
        products = (".git", ".venv", "build", "dist", "runs", "*.so", "*.egg-info")
        shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*products))
        # The sdist, then the wheel from the sdist.
        run([sys.executable, "-m", "build", "--outdir", str(base / "dist"), str(source)])
        (wheel,) = (base / "dist").glob("*.whl")
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
        if any(name.startswith("kernels/") for name in zipfile.ZipFile(wheel).namelist()):
            raise SystemExit("the wheel installs a top-level package `kernels`")

        environment = base / "empty"
        venv.create(environment, with_pip=False)
        python = environment / "bin" / "python"
        target = next((environment / "lib").glob("python*")) / "site-packages"
        run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)])
        # The dependencies, but not the editable pymape of the environment that runs this: its .pth files are not read.
        link = target / "dependencies.pth"
        link.write_text("\n".join(site.getsitepackages()) + "\n")
        clean = {"PATH": "/nonexistent", "HOME": os.environ.get("HOME", "/"), "HF_HUB_OFFLINE": "1"}
        subprocess.run([str(python), "-c", CHECK], check=True, cwd=base, env=clean)
        subprocess.run([str(python), "-m", "pymape", "--version"], check=True, cwd=base, env=clean)


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})


if __name__ == "__main__":
    main()
