"""The CPU kernels on one thread and on more: what a second core brings, of a product or a copy as of ours."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.bench_greedy_swap import gradients, largest
from benchmarks.harness import Report, alternate
from pymape.ops import gate_heads, greedy_swap, masked_activation, module_scores, selected_weight_grad

DEVICE = "cpu"
BATCH, TOKENS, HEADS, SIZE, FILTERS = 16, 128, 12, 64, 3072


def add_options(parser: argparse.ArgumentParser, device: str) -> None:
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, 2, os.cpu_count() or 1}))


def run(report: Report, options: argparse.Namespace) -> None:
    report.notes += [
        f"{BATCH} x {TOKENS} tokens of a BERT-base layer; the bits of pymape's results are the same for every number",
        "copy and product: torch's own, for what the machine's second core can bring at all",
    ]
    before = torch.get_num_threads()
    for shape, call, result in _calls():
        expected = None
        for threads in options.threads:
            torch.set_num_threads(threads)
            found = result()
            if expected is not None and not all(map(torch.equal, found, expected)):
                raise RuntimeError(f"{shape} must not depend on the number of threads, got other bits with {threads}")
            expected = found
        cases = alternate(shape, {f"{n} thread{'s' * (n > 1)}": _on(n, call) for n in options.threads}, seconds=0.4)
        for case in cases[1:]:
            case.figures["x one thread"] = cases[0].median_s / case.median_s
        report.add(cases)
    torch.set_num_threads(before)


def _on(threads: int, call: Callable[[], object]) -> Callable[[], object]:
    def timed() -> object:
        torch.set_num_threads(threads)
        return call()

    return timed


def _calls() -> Iterator[tuple[str, Callable[[], Any], Callable[[], list[torch.Tensor]]]]:
    """Name, the call that is timed, and one for the tensors that must be the same on any number of threads."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        filters, grad = torch.randn(2, BATCH, TOKENS, FILTERS).to(dtype)
        yield _same(f"module_scores, filters {name}", lambda a=filters, b=grad: [module_scores(a, b)])
        heads, d_heads = torch.randn(2, BATCH, TOKENS, HEADS, SIZE).to(dtype)
        gate = torch.rand(BATCH, HEADS, requires_grad=True)
        heads.requires_grad_()
        yield _same(
            f"gate_heads step {name}",
            lambda x=heads, g=gate, d=d_heads: torch.autograd.grad(gate_heads(x, g), (x, g), d),
        )
        filter_gate = torch.rand(BATCH, FILTERS, requires_grad=True)
        filters.requires_grad_()
        yield _same(
            f"masked_activation step, gelu {name}",
            lambda x=filters, g=filter_gate, d=grad: torch.autograd.grad(masked_activation(x, g), (x, g), d),
        )
    forget, retain = (gradients(64, 12, FILTERS, seed=seed) for seed in (1, 2))
    mask = largest(forget.square().mean(dim=0))
    yield _same("greedy_swap 12x3072, 64 + 64 samples", lambda: list(greedy_swap(forget, retain, mask)))
    x, dy = torch.randn(BATCH * TOKENS, 768), torch.randn(BATCH * TOKENS, FILTERS)
    index = torch.randperm(FILTERS)[: FILTERS // 10]
    # A product of torch's, whose bits may follow the number of threads.
    yield "selected_weight_grad rows", lambda: selected_weight_grad(x, dy, index, "rows"), lambda: []
    left, right = torch.randn(2, 1024, 1024)
    yield "product 1024x1024x1024", lambda: left @ right, lambda: []
    source = torch.randn(BATCH * TOKENS * FILTERS)
    target = torch.empty_like(source)
    yield "copy of 25 MB", lambda: target.copy_(source), lambda: []


def _same(
    name: str, call: Callable[[], Sequence[torch.Tensor]]
) -> tuple[str, Callable[[], Any], Callable[[], list[torch.Tensor]]]:
    return name, call, lambda: [x.detach().clone() for x in call()]
