"""Experiments: grids of unlearning methods on small tasks, held against retraining; resumable, cell by cell."""
