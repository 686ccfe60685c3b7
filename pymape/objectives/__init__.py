"""Unlearning objectives, one file each; `@objective("name")` adds one."""

from __future__ import annotations

from pymape.objectives import (  # noqa: F401  (each registers itself)
    dpo,
    ft,
    ga,
    gd,
    idk,
    influence,
    kl,
    l1_sparse,
    match,
    npo,
    rl,
    rmu,
    simnpo,
    so,
    ssd,
)
from pymape.objectives.one_shot import OneShot, RecordGradients
from pymape.objectives.registry import Objective, get_objective, objective, objective_names
from pymape.objectives.step import Step, UnlearnBatch

__all__ = [
    "Objective",
    "OneShot",
    "RecordGradients",
    "Step",
    "UnlearnBatch",
    "get_objective",
    "objective",
    "objective_names",
]
