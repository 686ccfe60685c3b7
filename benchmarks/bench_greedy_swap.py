"""greedy_swap against a PyTorch loop of the published rearrangement, and at the size of a 7B model.

The gradients are synthetic: in every layer eight shared directions plus independent noise, all standard normal, scaled
by log-normal sizes of the modules and of the samples (sigma 1), so that they are correlated and heavy-tailed.
"""

from __future__ import annotations

import argparse
import resource
import sys

import torch
from torch import Tensor

from benchmarks.harness import Case, Report, alternate
from pymape.ops import greedy_swap, greedy_swap_reference

KEPT = 0.1


def run(report: Report, options: argparse.Namespace) -> None:
    device = report.device
    report.notes.append("synthetic gradients: rank 8 + noise, log-normal sizes, seeds 0 to 2")
    if device != "cpu":  # Llama-3-8B, which has a target; on two cores it takes too long for a benchmark
        report.add([swaps(layers=32, modules=14336, samples=256, device=device)])
    for samples in (64, 512):
        report.add(rearrangement(layers=12, modules=3072, samples=samples, device=device))
    report.add(against_a_loop(layers=2, modules=3072, samples=128, device=device))
    report.add([swaps(layers=32, modules=11008, samples=128, device=device)])


def rearrangement(*, layers: int, modules: int, samples: int, device: str) -> list[Case]:
    forget = gradients(samples, layers, modules, seed=1).to(device)
    mask = largest(forget.square().sum(dim=0))
    result = greedy_swap(forget, None, mask, mode="rearrange")
    # In fp64, as greedy_swap adds: in fp32 the loop's own rounding would decide what is almost equal.
    assert torch.equal(result.mask, published_rearrangement(forget.double(), mask))
    cases = alternate(
        f"rearrange {layers}x{modules}, {samples} samples",
        {
            "pymape": lambda: greedy_swap(forget, None, mask, mode="rearrange"),
            "PyTorch loop": lambda: published_rearrangement(forget, mask),
        },
        seconds=1.0,
        least=3,
    )
    cases[0].figures["speed-up"] = cases[1].median_s / cases[0].median_s
    cases[0].figures["swaps"] = float(result.swaps.sum())
    return cases


def against_a_loop(*, layers: int, modules: int, samples: int, device: str) -> list[Case]:
    forget, retain = (gradients(samples, layers, modules, seed=seed).to(device) for seed in (1, 2))
    mask = largest((forget.square() - retain.square()).mean(dim=0))
    result, plain = greedy_swap(forget, retain, mask), plain_swaps(forget, retain, mask)
    torch.testing.assert_close(result.objective_after, plain, rtol=1e-6, atol=0)
    cases = alternate(
        f"swap {layers}x{modules}, {samples} + {samples} samples",
        {
            "pymape": lambda: greedy_swap(forget, retain, mask),
            "PyTorch loop": lambda: plain_swaps(forget, retain, mask),
        },
        seconds=0,
        least=3,
    )
    cases[0].figures["speed-up"] = cases[1].median_s / cases[0].median_s
    cases[0].figures["swaps"] = float(result.swaps.sum())
    return cases


def swaps(*, layers: int, modules: int, samples: int, device: str) -> Case:
    forget, retain = (gradients(samples, layers, modules, seed=seed).to(device) for seed in (1, 2))
    mask = largest((forget.square() - retain.square()).mean(dim=0))
    part = (forget[:, :2, :384], retain[:, :2, :384], mask[:2, :384])
    assert torch.equal(greedy_swap(*part).mask, greedy_swap_reference(*part).mask)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()  # an earlier case may have held more
    result = greedy_swap(forget, retain, mask)
    assert (result.objective_after >= result.objective_before).all()
    shape = f"swap {layers}x{modules}, {samples} + {samples} samples"
    case, *_ = alternate(shape, {"pymape": lambda: greedy_swap(forget, retain, mask)}, least=3)
    case.figures = {"swaps": float(result.swaps.sum()), "peak GB": peak_bytes(device) / 1e9}
    return case


def plain_swaps(forget: Tensor, retain: Tensor, mask: Tensor, max_swaps: int = 400) -> Tensor:
    """The search as a plain loop that keeps Q and c = Q 1_S of a layer, and J after it [L], in fp64."""
    after = []
    for layer in range(mask.shape[0]):
        wanted, spared = forget[:, layer].double(), retain[:, layer].double()
        quadratic = wanted.T @ wanted / len(wanted) - spared.T @ spared / len(spared)  # [M, M]
        half, selected = quadratic.diagonal() / 2, mask[layer].clone()
        coupling = quadratic @ selected.double()
        for _ in range(max_swaps):
            inside, outside = selected.nonzero().squeeze(1), (~selected).nonzero().squeeze(1)
            enters, leaves = (half + coupling)[outside], (half - coupling)[inside]
            gain = enters[:, None] + leaves - quadratic[outside[:, None], inside]
            if gain.numel() == 0 or gain.max() <= 0:
                break
            best = int(gain.argmax())
            i, j = outside[best // len(inside)], inside[best % len(inside)]
            selected[i], selected[j] = True, False
            coupling += quadratic[i] - quadratic[j]
        chosen = selected.double()
        after.append(chosen @ quadratic @ chosen / 2)
    return torch.stack(after)


def published_rearrangement(forget: Tensor, mask: Tensor) -> Tensor:
    """The one-pass procedure of Kwon et al. 2022 as a plain loop over layers and kept modules."""
    result = torch.ones_like(mask)
    for layer in range(mask.shape[0]):
        vectors = forget[:, layer].T.contiguous()  # [M, N]
        kept = mask[layer].nonzero().squeeze(1)
        kept = kept[vectors[kept].square().sum(dim=1).argsort()]
        pruned = (~mask[layer]).nonzero().squeeze(1).tolist()
        for module in kept.tolist():
            pruned.append(module)
            members = vectors[pruned]
            lengths = (members.sum(dim=0) - members).square().sum(dim=1)
            pruned.pop(int(lengths.argmin()))
        result[layer, pruned] = False
    return result


def gradients(samples: int, layers: int, modules: int, seed: int) -> Tensor:
    shared = torch.Generator().manual_seed(0)
    directions = torch.randn(layers, 8, modules, generator=shared)
    sizes = torch.randn(layers, 1, modules, generator=shared).exp()
    own = torch.Generator().manual_seed(seed)
    weights = torch.randn(layers, samples, 8, generator=own)
    scales = torch.randn(samples, 1, generator=own).exp() * 1e-4
    result = torch.empty(samples, layers, modules)
    for layer in range(layers):
        noise = torch.randn(samples, modules, generator=own)
        result[:, layer] = (weights[layer] @ directions[layer] + noise) * sizes[layer] * scales
    return result


def largest(scores: Tensor) -> Tensor:
    """Select the KEPT share of every layer with the largest scores."""
    chosen = scores.topk(round(KEPT * scores.shape[1]), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


def peak_bytes(device: str) -> int:
    """Return the most memory the process has held, inputs included (on CUDA, what torch has allocated there)."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
