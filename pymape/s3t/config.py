"""The options of an S3T system. They are fixed when it is made: every stage depends on them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "Combination",
    "EngineName",
    "LoraConfig",
    "S3TConfig",
    "S3TDemoConfig",
    "SequenceMethod",
    "StageConfig",
    "check_config",
]

Combination = Literal["mean", "vote", "size"]
EngineName = Literal["local", "inline", "ray"]
SequenceMethod = Literal["chain-cover", "cyclic", "matching", "conditional", "random"]


@dataclass
class LoraConfig:
    """The adapters of every slice.

    Args:
        r: rank.
        alpha: the update is scaled by alpha / r, or alpha / sqrt(r) with rslora; positive.
        rslora: rank-stabilised scaling.
        targets: "qv" (query and value projections), "attention" (all four) or "all" (the feed-forward network's too).
        dropout: on the input of the adapters, in training.
    """

    r: int = 16
    alpha: float = 16.0
    rslora: bool = False
    targets: Literal["qv", "attention", "all"] = "qv"
    dropout: float = 0.0


@dataclass
class StageConfig:
    """How a stage is trained; a part of what the stage is.

    Args:
        epochs: passes over the records of the stage's slices.
        lr: peak learning rate of AdamW; it rises over the first tenth of the steps and falls linearly to zero.
        batch_size: records per step; every batch has this many rows, the last one filled up with rows that count
            for nothing.
        max_length: tokens that every text is padded or cut to, so that batches have one shape.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm; inf: never.
        threads: of every operation. Bits depend on it, so it is recorded and set.
        device: "cpu" or "cuda". Bits depend on it too, and on the kind of GPU. On one, torch's deterministic algorithms
            are used; an operation that has none is refused.
    """

    epochs: int = 3
    lr: float = 1e-3
    batch_size: int = 32
    max_length: int = 64
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass
class S3TConfig:
    """An S3T system.

    Args:
        model: Hugging Face model folder of the frozen base.
        labels: number of classes of a new task head; default: the model brings its own head.
        shards: m, number of parts of the data that train models of their own.
        slices: L, number of parts of a shard that are switched off one by one.
        sequences: B, number of slice orders that every shard trains; default: as many as a chain cover has,
            L choose L / 2.
        method: how the orders are chosen.
        prior: probability that a request falls into each slice of a shard, L values; default: uniform.
        layers_per_slice: g, layers that a slice's adapters cover; default: all layers divided by L, rounded down.
        lora: the adapters.
        stage: the training of one stage.
        seed: master seed.
    """

    model: str
    labels: int | None = None
    shards: int = 3
    slices: int = 4
    sequences: int | None = None
    method: SequenceMethod = "chain-cover"
    prior: list[float] | None = None
    layers_per_slice: int | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    seed: int = 0


@dataclass
class S3TDemoConfig:
    """The S3T demo on scikit-learn's digits.

    Args:
        output: folder of the report and the systems.
        methods: ways of choosing sequences that are compared with SISA.
        shards: m.
        slices: L.
        budget: B, sequences of every shard, for all methods alike.
        epochs: of a stage.
        base_epochs: of the base model, on records that are in no system.
        workers: processes that train; 1 trains in this one.
        seed: of everything random.
    """

    output: str = "runs/s3t-demo"
    methods: list[Literal["chain-cover", "cyclic"]] = field(default_factory=lambda: ["chain-cover", "cyclic"])
    shards: int = 3
    slices: int = 4
    budget: int = 6
    epochs: int = 8
    base_epochs: int = 40
    workers: int = 2
    seed: int = 0


def check_config(config: S3TConfig) -> None:
    """Refuse options out of range.

    Raises:
        ValueError: naming the first one.
    """
    stage = config.stage
    least = {
        "shards": (config.shards, 1),
        "slices": (config.slices, 1),
        "lora.r": (config.lora.r, 1),
        "stage.epochs": (stage.epochs, 1),
        "stage.batch_size": (stage.batch_size, 2),
        "stage.max_length": (stage.max_length, 1),
        "stage.threads": (stage.threads, 1),
        **({} if config.labels is None else {"labels": (config.labels, 1)}),
    }
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")
    if stage.device not in ("cpu", "cuda"):
        raise ValueError(f"stage.device must be 'cpu' or 'cuda', got {stage.device!r}")
    if config.prior is not None and len(config.prior) != config.slices:
        raise ValueError(f"prior must hold a probability for each of {config.slices} slices, got {config.prior}")
    if config.sequences is not None and not 1 <= config.sequences <= math.factorial(config.slices):
        most = f"{config.slices}! = {math.factorial(config.slices)}"
        raise ValueError(f"sequences must be 1 to {most}, got {config.sequences}")
    if not 0 <= config.lora.dropout < 1:
        raise ValueError(f"lora.dropout must be in [0, 1), got {config.lora.dropout}")
    for name, factor in (("lora.alpha", config.lora.alpha), ("stage.lr", stage.lr)):
        if not 0 < factor < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {factor}")
    if not 0 <= stage.weight_decay < math.inf:
        raise ValueError(f"stage.weight_decay must be at least 0 and finite, got {stage.weight_decay}")
    if not stage.max_grad_norm > 0:
        raise ValueError(f"stage.max_grad_norm must be positive (inf: no clipping), got {stage.max_grad_norm}")
