"""Unlearning with `transformers.Trainer`."""

from pymape.trainer.trainer import UnlearnTrainer

__all__ = ["UnlearnTrainer"]
