"""Two gloo processes give what one gives; where one fails, all do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_zoo import tiny_batch, tiny_model

import pymape
from pymape.importance import Importance
from pymape.masks import ModuleMasks

RECORDS = 13
WORKER = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from test_distributed import records, run
import pymape
from model_zoo import tiny_model

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[2])
for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
    forget, retain, masks = run(dtype)
    forget.save(folder / f"{name}-forget-{rank}")
    retain.save(folder / f"{name}-retain-{rank}")
    masks.save(folder / f"{name}-masks-{rank}")
    # Fewer batches than processes: one of them has nothing to do.
pymape.importance(tiny_model("bert"), records(3), batch_size=8).save(folder / f"small-{rank}")

def message(data, **options):
    try:
        pymape.importance(tiny_model("bert"), data, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

broken = records()
broken[RECORDS - 1]["labels"] = torch.tensor(99)
sampler = torch.utils.data.DistributedSampler(records(), 2, rank)
found = {
    "label": message(broken, batch_size=4),
    "other data": message(records(RECORDS + rank)),
    "divided data": message(torch.utils.data.DataLoader(records(), sampler=sampler, batch_size=4)),
    "one argument": message(records() if rank == 0 else []),
    "twice": message([*records(), records(1)[0]], batch_size=1, bucket=False),
    "and then": message(records()),
}
(folder / f"messages-{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
""".replace("RECORDS", str(RECORDS))


def records(count: int = RECORDS, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    """Records of different lengths with ids of their own."""
    rows = []
    for row in range(count):
        batch = tiny_batch("bert", batch=1, seed=seed + row, length=4 + row % 5)
        rows.append({"id": f"{seed}-{row}", **{name: value[0] for name, value in batch.items()}})
    return rows


def run(dtype: torch.dtype) -> tuple[Importance, Importance, ModuleMasks]:
    model = tiny_model("bert")
    forget, retain = (pymape.importance(model, records(seed=seed), batch_size=3, dtype=dtype) for seed in (3, 50))
    return forget, retain, pymape.search(forget=forget, retain=retain, budget=0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [*command, str(folder / "worker.py"), here, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_importance_and_masks_are_those_of_one_process(folder: Path, name: str, dtype: torch.dtype) -> None:
    forget, retain, masks = run(dtype)
    for kind, one in (("forget", forget), ("retain", retain)):
        first, second = (Importance.load(folder / f"{name}-{kind}-{rank}") for rank in range(2))
        assert first.ids == second.ids == one.ids
        for part in ("heads", "filters"):
            torch.testing.assert_close(getattr(first, part), getattr(one, part), rtol=1e-5, atol=1e-7)
            assert torch.equal(getattr(first, part), getattr(second, part))
            assert getattr(first, part).dtype == dtype
    for rank in range(2):
        two = ModuleMasks.load(folder / f"{name}-masks-{rank}")
        assert torch.equal(two.heads, masks.heads)
        assert torch.equal(two.filters, masks.filters)
        assert masks.cost() > 0.3


def test_a_process_may_have_nothing_to_do(folder: Path) -> None:
    one = pymape.importance(tiny_model("bert"), records(3), batch_size=8)
    for rank in range(2):
        two = Importance.load(folder / f"small-{rank}")
        assert two.ids == one.ids
        torch.testing.assert_close(two.filters, one.filters, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "case, expected",
    [
        ("label", r"ValueError: labels must be in \[0, 3\), got 99 for id '3-12'"),
        ("other data", "data must be the same in every process, got another in process 1 than in 0"),
        ("divided data", "data must be the same in every process, got another in process 1 than in 0"),
        ("one argument", "ValueError: data must hold at least one record, got an empty data set"),
        ("twice", "ids must be unique, got .'3-0'. more than once"),
    ],
)
def test_where_one_process_fails_all_do(folder: Path, case: str, expected: str) -> None:
    for rank in range(2):
        messages = json.loads((folder / f"messages-{rank}.json").read_text())
        assert re.search(expected, messages[case] or ""), messages
        assert messages["and then"] is None  # the processes are still in step
