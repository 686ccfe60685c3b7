"""Unlearning objectives, one file each; `@objective("name")` adds one."""

from __future__ import annotations

from pymape.objectives import ft, ga, gd, influence, kl, npo, rl  # noqa: F401  (each registers itself)
from pymape.objectives.registry import Objective, get_objective, objective, objective_names
from pymape.objectives.step import OneShot, Step, UnlearnBatch

__all__ = ["Objective", "OneShot", "Step", "UnlearnBatch", "get_objective", "objective", "objective_names"]
