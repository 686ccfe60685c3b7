"""An S3T ensemble in one forward pass, against its shards as separate PEFT models.

What no sharing can save is the layers where shards differ. If every pass through a layer took the same time, the
speed-up would be the number of layers that separate models run, divided by the number that the ensemble runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from benchmarks.harness import Case, Report, alternate
from pymape.s3t.adapters import SlicedAdapters
from pymape.s3t.config import LoraConfig, S3TConfig
from pymape.s3t.ensemble import Chain, Ensemble
from pymape.s3t.export import export_ensemble
from pymape.s3t.frozen_base import load_base

BATCH, TOKENS, VOCABULARY, RANK = 8, 64, 3000, 16
# layers, width, slices, layers that are adapted in each shard, LoRA targets
CASES: dict[str, tuple[int, int, int, tuple[int, ...], Any]] = {
    "MiniLM, upper half": (6, 384, 2, (3,) * 5, "qv"),
    "MiniLM, upper half, all linears": (6, 384, 2, (3,) * 5, "all"),
    "12 x 256, upper half": (12, 256, 2, (6,) * 5, "qv"),
    "MiniLM after deletions": (6, 384, 3, (6, 4, 4, 2, 2), "qv"),
}


def add_options(parser: argparse.ArgumentParser, device: str) -> None:
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="how long a contender is measured in each case")


def run(report: Report, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    for name, (layers, width, slices, adapted, targets) in CASES.items():
        possible = len(adapted) * layers / layers_run(layers, adapted)
        with tempfile.TemporaryDirectory() as place:
            folder = make_base(Path(place) / "base", layers, width)
            config = S3TConfig(folder, slices=slices, lora=LoraConfig(r=RANK, alpha=RANK, targets=targets))
            chains = make_chains(config, [count * slices // layers for count in adapted])
            compare(report, name, config, chains, Path(place) / "export", possible, options.seconds)
    report.notes += [
        f"{len(adapted)} shards, {BATCH} x {TOKENS} tokens, rank {RANK}, fp32, random weights; logits compared before",
        "after deletions: 6, 4, 4, 2 and 2 of 6 layers are adapted",
        "one thread on a CPU: processor times, which other work on the machine disturbs less than wall times",
        "possible: layers that the separate models run / layers that the ensemble runs",
    ]


def make_base(folder: Path, layers: int, width: int) -> str:
    """A BERT with heads of 32 and a small vocabulary: what the embeddings cost hardly depends on it."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 32, intermediate_size=4 * width,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def make_chains(config: S3TConfig, depths: Sequence[int]) -> dict[int, Chain]:
    """Random stages of every shard."""
    adapters, generator = SlicedAdapters(load_base(config.model), config), torch.Generator().manual_seed(0)
    return {
        shard: [
            {
                name: 0.05 * torch.randn(parameter.shape, generator=generator)
                for name, parameter in adapters.trainable(stage).items()
            }
            for stage in range(1, depth + 1)
        ]
        for shard, depth in enumerate(depths)
    }


def layers_run(layers: int, adapted: Sequence[int]) -> int:
    """Passes of one batch through one layer that the ensemble needs: shards without adapters so far run as one."""
    own = [sum(layer >= layers - count for count in adapted) for layer in range(layers)]
    return sum(count + (count < len(adapted)) for count in own)


@torch.inference_mode()
def compare(
    report: Report,
    name: str,
    config: S3TConfig,
    chains: Mapping[int, Chain],
    export: Path,
    possible: float,
    seconds: float,
) -> None:
    device = report.device
    export_ensemble(export, config, chains)
    models = [PeftModel.from_pretrained(load_base(config.model), export / f"shard-{shard:02d}") for shard in chains]
    models = [model.to(device).eval() for model in models]
    ensemble = Ensemble(config.model, config, chains).to(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=generator).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][: BATCH // 2, TOKENS * 3 // 4 :] = 0

    def separate() -> Tensor:
        return torch.stack([model(**inputs).logits for model in models])

    expected, found = separate(), ensemble(**inputs).shard_logits
    near = 1e-5 if device == "cpu" else 1e-4  # on a GPU products of other shapes may take other kernels
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    calls: dict[str, Callable[[], object]] = {"separate PEFT models": separate, "ensemble": lambda: ensemble(**inputs)}
    alone = device == "cpu" and torch.get_num_threads() == 1
    apart, ours = (processor_time if alone else alternate)(name, calls, seconds=seconds)
    speed_up, same = apart.median_s / ours.median_s, torch.equal(found, expected)
    ours.figures = {"speed-up": speed_up, "possible": possible, "same bits": float(same)}
    report.add([apart, ours])


def processor_time(shape: str, calls: Mapping[str, Callable[[], object]], *, seconds: float) -> list[Case]:
    """As `alternate`, but with the time that the process was given: other work on the machine disturbs it less."""
    spent: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str) -> None:
        start = time.process_time()
        calls[name]()
        spent[name].append(time.process_time() - start)

    alternate(shape, {name: partial(timed, name) for name in calls}, seconds=seconds)
    warm_up = 2
    return [
        Case(shape, name, *(float(np.percentile(times[warm_up:], q)) for q in (50, 20, 80)))
        for name, times in spent.items()
    ]
