"""Microbenchmarks: `python -m benchmarks OP [--device cpu] [--json FILE]`, or `all`."""
