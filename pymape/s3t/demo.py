"""S3T on data that every installation has: train on digits, delete until a shard dies, compare with SISA.

1. scikit-learn's 1797 digits are split into a public quarter, a private half and a test quarter. A small ViT is trained
   on the public part: the frozen base. Only the private part enters the systems.
2. Each method trains m shards of L slices with B sequences. SISA gets the same base, adapters and options, and at least
   as many bytes for its checkpoints.
3. Requests delete one random private record after the other, the same records in the same order for every method, until
   a shard of the last S3T system has died. After each request: accuracy on the test part, depth of every shard, and the
   requests that the system is expected to take before a shard dies.
4. Every system is verified, and one stage of each trained again and compared bit by bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import ViTForImageClassification

from pymape.data.digits import digit_records, load_digits, small_vit
from pymape.s3t.config import LoraConfig, S3TConfig, S3TDemoConfig, StageConfig
from pymape.s3t.demo_page import demo_text, write_demo_page
from pymape.s3t.ensemble import Ensemble
from pymape.s3t.sisa import one_group, split_rows, train_plain, train_sisa
from pymape.s3t.stages import encode_row, unpack_stage
from pymape.s3t.system import S3T
from pymape.s3t.theory import forecast
from pymape.storage.runs import environment, quiet_transformers, run_folder, write_summary

__all__ = ["digit_parts", "pretrain", "run_s3t_demo"]

_MOST_REQUESTS = 200

Record = dict[str, Any]


def run_s3t_demo(config: S3TDemoConfig, *, as_json: bool = False) -> dict[str, Any]:
    """Run the demo, print its table and write its folder.

    Args:
        config: the demo's options.
        as_json: print the summary instead of the table.

    Returns:
        What `summary.json` holds.

    Raises:
        ValueError: an option out of range, or an output folder that cannot be written.
    """
    started = time.perf_counter()
    with run_folder(config.output, "s3t demo") as folder, quiet_transformers():
        public, private, test = digit_parts(config.seed)
        base = folder / "base"
        pretrain(public, config.seed, config.base_epochs).save_pretrained(base)
        order = [record["id"] for record in private]
        random.Random(config.seed).shuffle(order)
        settings = _settings(config, base)
        runs: dict[str, dict[str, Any]] = {}
        for name in config.methods:
            options = dataclasses.replace(settings, method=name)
            runs[name] = _run_system(folder / name, options, private, test, order, config)
        most = max(run["bytes"] for run in runs.values())
        requests = max(len(run["steps"]) for run in runs.values()) - 1
        runs["SISA"] = _run_sisa(settings, private, test, order[:requests], most)
        summary = {
            **environment(),
            "kind": "s3t demo",
            "config": dataclasses.asdict(config),
            "records": {"public": len(public), "private": len(private), "test": len(test)},
            "seconds": time.perf_counter() - started,
            "runs": runs,
        }
        write_demo_page(folder / "report.html", summary)
        write_summary(folder, summary)
    print(json.dumps(summary, indent=2) if as_json else demo_text(summary))
    return summary


def digit_parts(seed: int) -> tuple[list[Record], list[Record], list[Record]]:
    """Public, private and test records: a quarter, a half and a quarter of each class."""
    from sklearn.model_selection import train_test_split

    images, labels = load_digits()

    def halves(rows: Sequence[int]) -> tuple[list[int], list[int]]:
        return train_test_split(rows, test_size=0.5, random_state=seed, stratify=labels[list(rows)].numpy())

    private, rest = halves(range(len(labels)))
    public, test = halves(rest)
    return (
        digit_records(images, labels, public),
        digit_records(images, labels, private),
        digit_records(images, labels, test),
    )


def pretrain(records: list[Record], seed: int, epochs: int, **options: Any) -> ViTForImageClassification:
    """Train the base, a small ViT, from scratch.

    Args:
        records: public ones.
        seed: of the weights and of the order.
        epochs: passes over them.
        options: of `small_vit`.
    """
    images = torch.stack([record["pixel_values"] for record in records])
    labels = torch.stack([record["labels"] for record in records])
    model = small_vit(seed, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(records), generator=generator).split(32):
            optimizer.zero_grad()
            model(pixel_values=images[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
    return model.eval()


def _settings(config: S3TDemoConfig, base: Path) -> S3TConfig:
    return S3TConfig(
        str(base),
        shards=config.shards,
        slices=config.slices,
        sequences=config.budget,
        lora=LoraConfig(r=8, alpha=16, targets="all"),
        stage=StageConfig(epochs=config.epochs, lr=3e-3, batch_size=32),
        seed=config.seed,
    )


def _run_system(
    folder: Path,
    settings: S3TConfig,
    private: list[Record],
    test: list[Record],
    order: list[str],
    config: S3TDemoConfig,
) -> dict[str, Any]:
    key = hashlib.sha256(f"s3t demo {config.seed}".encode()).digest()  # no secret: the same places in every run
    with S3T.create(folder, settings, key=key) as system:
        system.ingest(private, progress=False)
        started = time.perf_counter()
        system.train(engine="inline" if config.workers == 1 else "local", workers=config.workers)
        seconds = time.perf_counter() - started
        stages = system.status()["stages"]["trained"]
        size = sum(path.stat().st_size for path in (folder / "stages").iterdir())
        steps = [_state(system, test, None)]
        latencies = []
        for number, identifier in enumerate(
            tqdm(order[:_MOST_REQUESTS], desc=settings.method, unit="request", disable=None)
        ):
            asked = time.perf_counter()
            system.delete([identifier], f"request-{number + 1}", finish=False)
            latencies.append(time.perf_counter() - asked)
            system.finish()
            steps.append(_state(system, test, steps[-1]))
            if min(steps[-1]["depths"]) == 0:
                break
        report = system.verify(replay=True)
        if not report["ok"]:
            raise RuntimeError(f"system must verify after its requests, got {report['problems'][0]}")
        return {
            "slices": settings.slices,
            "stages": stages,
            "bytes": size,
            "train_seconds": seconds,
            "steps": steps,
            "acknowledged_seconds": latencies,
            "verified": report["checked"],
        }


def _state(system: S3T, test: list[Record], before: dict[str, Any] | None) -> dict[str, Any]:
    """Accuracy, depths and what the system can still take."""
    status = system.status()
    serving = [shard["serving"] for shard in status["shards"]]
    if before is not None and serving == before["serving"]:
        accuracy = before["accuracy"]
    elif any(serving):
        accuracy = system.evaluate(test)["accuracy"]
    else:
        accuracy = None
    return {
        "accuracy": accuracy,
        "depths": [shard["depth"] for shard in status["shards"]],
        "serving": serving,
        "remaining": _remaining(system.forecast()),
    }


def _run_sisa(
    settings: S3TConfig, private: list[Record], test: list[Record], order: list[str], least: int
) -> dict[str, Any]:
    """The same requests to SISA, with as few slices as make its checkpoints at least as large as S3T's stages."""
    rows = tuple((record["id"], encode_row({**record, "id": None})) for record in private)
    started = time.perf_counter()
    size = len(
        train_plain(dataclasses.replace(settings, stage=dataclasses.replace(settings.stage, epochs=1)), rows[:8])
    )
    slices = -(-least // (settings.shards * size))
    shards = [
        train_sisa(settings, split_rows(part, slices, settings.seed), shard=number)
        for number, part in enumerate(split_rows(rows, settings.shards, settings.seed))
    ]
    seconds = time.perf_counter() - started
    options = one_group(settings)
    steps: list[dict[str, Any]] = []
    for number in range(len(order) + 1):
        deleted = [set(order[:number]) & {name for part in shard.slices for name in part} for shard in shards]
        depths = [shard.depth(gone) for shard, gone in zip(shards, deleted, strict=True)]
        live = [[len(set(part) - gone) for part in shard.slices] for shard, gone in zip(shards, deleted, strict=True)]
        if steps and depths == steps[-1]["depths"]:
            accuracy = steps[-1]["accuracy"]
        else:
            chains = {
                place: [unpack_stage(shard.checkpoints[depth - 1])[0]]
                for place, (shard, depth) in enumerate(zip(shards, depths, strict=True))
                if depth
            }
            accuracy = Ensemble(settings.model, options, chains).score(test)["accuracy"] if chains else None
        steps.append(
            {
                "accuracy": accuracy,
                "depths": depths,
                "serving": [list(range(depth)) for depth in depths],
                "remaining": _remaining(forecast([[tuple(range(depth))] for depth in depths], live)),
            }
        )
    return {
        "slices": slices,
        "stages": slices * settings.shards,
        "bytes": sum(shard.size for shard in shards),
        "train_seconds": seconds,
        "steps": steps,
    }


def _remaining(outlook: dict[str, Any]) -> float | None:
    """Deletions expected until the next shard dies."""
    deletions = outlook["next_shard_dead"]["deletions"]
    return None if deletions is None else float(deletions["mean"])
