"""The search for masks, end to end, against the same search written with plain PyTorch.

Both start from per-sample gradients and end with masks: diagonal of the Fisher information, warm start within the
budget, greedy swaps in every layer, for heads and filters. The gradients are those of the greedy_swap benchmark.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.bench_greedy_swap import gradients, plain_swaps
from benchmarks.bench_importance import bert_base
from benchmarks.harness import Report, alternate
from pymape import Importance, ModuleMasks, layout, search
from pymape.model_layout import ModelLayout

BUDGET = 0.1


def add_options(parser: argparse.ArgumentParser, device: str) -> None:
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--samples", type=int, default=128, help="of the forget set, and as many of the retain set")
    parser.add_argument("--rounds", type=int, default=3)


def run(report: Report, options: argparse.Namespace) -> None:
    device = report.device
    report.notes.append(f"budget {BUDGET:.0%}, at most 400 swaps a layer and kind; both reach the same objective")
    shape = layout(bert_base(options.layers))
    forget, retain = (_importance(shape, options.samples, seed, device) for seed in (1, 2))
    found = search(forget=forget, retain=retain, budget=BUDGET, backend=device)
    plain = _plain_search(forget, retain)
    torch.testing.assert_close(found.provenance["objective_after"], plain, rtol=1e-6, atol=0)
    cases = alternate(
        f"BERT-base, {options.layers} layers, {options.samples} + {options.samples} samples",
        {
            "pymape": lambda: search(forget=forget, retain=retain, budget=BUDGET, backend=device),
            "PyTorch loop": lambda: _plain_search(forget, retain),
        },
        seconds=0,
        least=options.rounds,
    )
    cases[0].figures |= {
        "speed-up": cases[1].median_s / cases[0].median_s,
        "swaps": float(found.provenance["swaps"]),
    }
    report.add(cases)


def _importance(shape: ModelLayout, samples: int, seed: int, device: str) -> Importance:
    widths = shape.heads, shape.filters
    heads, filters = (gradients(samples, shape.layers, width, seed).to(device) for width in widths)
    return Importance(heads, filters, [f"{seed}-{row}" for row in range(samples)], shape)


def _plain_search(forget: Importance, retain: Importance) -> float:
    """The same warm start and search; returns J, summed over layers and kinds."""
    kinds = [(forget.heads, retain.heads), (forget.filters, retain.filters)]
    fishers = [(f.double().square().mean(0), r.double().square().mean(0)) for f, r in kinds]
    weights = [1 / f.sum(1, keepdim=True) for f, _ in fishers]
    scores = [(f - r) / 2 * weight for (f, r), weight in zip(fishers, weights, strict=True)]
    masks = ModuleMasks.from_scores(scores[0], scores[1], forget.layout, BUDGET)
    return sum(
        float((plain_swaps(f, r, start.to(f.device)) * weight[:, 0]).sum())
        for (f, r), start, weight in zip(kinds, (masks.heads, masks.filters), weights, strict=True)
    )
