"""Triton kernels, one module per operator; installed as `pymape.kernels`. They import torch and triton alone."""
