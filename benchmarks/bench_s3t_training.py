"""Training all stages of one sequence with cached states of the frozen layers below each stage, and without.

Without the cache a step at depth i computes N layers forward and i g backward, with it i g each. Stage i has i slices,
so over a sequence the times can differ by the factor sum i (N + i g) / sum 2 i^2 g at most: if a layer costs the same
in both directions, and computing the states once, at the beginning, costs nothing.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.harness import Case, Report
from pymape.s3t.config import LoraConfig, S3TConfig, StageConfig
from pymape.s3t.frozen_base import base_hash
from pymape.s3t.stages import StageKey, encode_row
from pymape.s3t.training import StageJob, train_stage

DEVICE = "cpu"
SLICES, VOCABULARY = 4, 1000


def add_options(parser: argparse.ArgumentParser, device: str) -> None:
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--records", type=int, default=24, help="of each slice")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)


def run(report: Report, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    report.notes += [
        f"BERT layers of width {options.hidden}, {SLICES} stages of one sequence on {options.records} records a slice, "
        f"{options.batch_size} x {options.tokens} tokens, {options.epochs} epochs, fp32, LoRA r 8 on query and value",
        f"processor time, {options.rounds} alternating rounds; stage files are the same bytes; the cache is empty at "
        "the beginning of a sequence",
    ]
    with tempfile.TemporaryDirectory() as folder:
        _write_model(folder, options)
        for share in (1, 2):
            size = options.layers // (SLICES * share)
            _compare(report, folder, size, options)


def _compare(report: Report, folder: str, layers_per_slice: int, options: Any) -> None:
    config = S3TConfig(
        f"{folder}/model",
        slices=SLICES,
        layers_per_slice=layers_per_slice,
        lora=LoraConfig(r=8),
        stage=StageConfig(options.epochs, 1e-3, options.batch_size, options.tokens, threads=options.threads),
    )
    train = _sequence(config, options)

    def from_empty() -> list[bytes]:
        shutil.rmtree(f"{folder}/cache", ignore_errors=True)
        return train(f"{folder}/cache")

    contenders: dict[str, Callable[[], list[bytes]]] = {"without cache": lambda: train(None), "cache": from_empty}
    # Not the harness's two calls to warm up: one takes long enough to be its own.
    times: dict[str, list[float]] = {name: [] for name in contenders}
    found = set()
    for _ in range(options.rounds):
        for name, call in contenders.items():
            start = time.process_time()
            files = call()
            times[name].append(time.process_time() - start)
            found.add(b"".join(files))
    if len(found) != 1:
        raise RuntimeError("training with the prefix cache must give the same bits as without, got others")
    shape = f"{layers_per_slice * SLICES} of {options.layers} layers"
    cases = [Case(shape, name, *(float(np.percentile(t, q)) for q in (50, 20, 80))) for name, t in times.items()]
    stages = range(1, SLICES + 1)
    plain = sum(i * (options.layers + i * layers_per_slice) for i in stages)
    most = plain / sum(2 * i * i * layers_per_slice for i in stages)
    cases[1].figures |= {"speed-up": cases[0].median_s / cases[1].median_s, "at most": most}
    report.add(cases)


def _sequence(config: S3TConfig, options: Any) -> Callable[[str | None], list[bytes]]:
    """What trains all stages, given the folder of the cache."""
    generator = torch.Generator().manual_seed(0)
    base, rows = base_hash(config.model), []
    for part in range(SLICES):
        tokens = torch.randint(3, VOCABULARY, (options.records, options.tokens), generator=generator)
        records = [{"input_ids": ids, "labels": int(ids[0]) % 2} for ids in tokens]
        rows.append(tuple((f"{part}-{row}", encode_row(record)) for row, record in enumerate(records)))

    def train(cache: str | None) -> list[bytes]:
        files: list[bytes] = []
        for depth in range(1, SLICES + 1):
            key = StageKey(0, tuple(range(depth)))
            files.append(train_stage(StageJob.of(config, key, base, rows[:depth], files, cache)))
        return files

    return train


def _write_model(folder: str, options: Any) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=options.hidden, num_hidden_layers=options.layers, num_attention_heads=options.hidden // 64,
        intermediate_size=4 * options.hidden, vocab_size=VOCABULARY, num_labels=2,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(Path(folder) / "model")
