"""segmented_lora against what PEFT does for several adapters, and against batched products over padded segments."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness import Report, add_rates, compare
from pymape.ops import segmented_lora, segmented_lora_reference

TOKENS, RANK = 128, 16
# width of the layer, samples of every segment, tokens of a sample
CASES = {
    "BERT-base": (768, (8,) * 5, TOKENS),
    "BERT-base, uneven": (768, (16, 1, 9, 3, 11), TOKENS),
    "BERT-base, one token": (768, (1,) * 5, 1),
    "TinyLlama-1.1B": (2048, (4,) * 5, TOKENS),
}


def run(report: Report, options: argparse.Namespace) -> None:
    device = report.device
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    report.notes += [
        f"rank {RANK}, five adapters, square layers, {str(dtype)[6:]}; on CPU pymape's bits are those of the loop",
        "adapters alone: the frozen layer's output is given; loop: two products a segment, which is what PEFT computes",
        "whole layer: with the frozen layer; PEFT's lora.Linear, one per segment, or one for all with adapter_names",
    ]
    with torch.inference_mode():
        for name, (width, samples, tokens) in CASES.items():
            label = f"{name} {'+'.join(map(str, samples))} x {tokens}"
            problem = _Problem(width, samples, tokens, dtype, device)
            _compare(report, label, problem, dtype, device)


class _Problem:
    """A batch whose samples belong to segments, a frozen layer, and an adapter for every segment."""

    def __init__(self, width: int, samples: Sequence[int], tokens: int, dtype: torch.dtype, device: str) -> None:
        self.adapters, self.samples = len(samples), samples
        self.layer = nn.Linear(width, width).to(device, dtype)
        self.batch = torch.randn(sum(samples), tokens, width, device=device).to(dtype)
        self.x = self.batch.flatten(0, 1)
        self.sizes = [count * tokens for count in samples]
        self.offsets = [0, *accumulate(self.sizes)]
        self.lora_a = (torch.randn(self.adapters, RANK, width, device=device) / width**0.5).to(dtype)
        self.lora_b = torch.randn(self.adapters, width, RANK, device=device).to(dtype)
        self.scale = [RANK**0.5] * self.adapters
        self.base = self.layer(self.x)

    def given(self) -> tuple[Any, ...]:
        return self.lora_a, self.lora_b, self.offsets, range(self.adapters), self.scale

    def loop(self) -> Tensor:
        parts = []
        for adapter, (start, end) in enumerate(pairwise(self.offsets)):
            h = self.x[start:end] @ self.lora_a[adapter].t()
            parts.append(self.base[start:end] + h @ self.lora_b[adapter].t() * self.scale[adapter])
        return torch.cat(parts)

    def padded(self) -> Tensor:
        even = len(set(self.sizes)) == 1
        rows, given = (
            x.view(self.adapters, -1, x.shape[1]) if even else pad_sequence(x.split(self.sizes), batch_first=True)
            for x in (self.x, self.base)
        )
        products = rows @ self.lora_a.transpose(1, 2)
        result = torch.baddbmm(given, products, self.lora_b.transpose(1, 2), alpha=self.scale[0])
        if even:
            return result.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(result, self.sizes, strict=True)])

    @functools.cached_property
    def peft_layer(self) -> Any:
        """The frozen layer with all adapters, "0", "1", ..."""
        return self._peft(range(self.adapters))

    @functools.cached_property
    def peft_layers(self) -> list[Any]:
        """The frozen layer with one adapter each."""
        return [self._peft([adapter]) for adapter in range(self.adapters)]

    def _peft(self, adapters: Sequence[int]) -> Any:
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, use_rslora=True)
        first = str(adapters[0])
        layer = peft.tuners.lora.Linear(self.layer, first, config, r=RANK, lora_alpha=RANK)
        for adapter in adapters:
            if str(adapter) != first:
                layer.update_layer(str(adapter), RANK, lora_alpha=RANK, config=config)
            layer.lora_A[str(adapter)].weight = nn.Parameter(self.lora_a[adapter])
            layer.lora_B[str(adapter)].weight = nn.Parameter(self.lora_b[adapter])
        return layer.eval()


def _compare(report: Report, label: str, problem: _Problem, dtype: torch.dtype, device: str) -> None:
    p = problem
    names = [str(adapter) for adapter, count in enumerate(p.samples) for _ in range(count)]
    alone: dict[str, Callable[[], Tensor]] = {
        "pymape": lambda: segmented_lora(p.x, p.base, *p.given()),
        "loop of products": p.loop,
        "padded bmm": p.padded,
    }
    whole: dict[str, Callable[[], Tensor]] = {
        "pymape": lambda: segmented_lora(p.x, p.layer(p.x), *p.given()),
        "PEFT loop": lambda: torch.cat([one(x) for one, x in zip(p.peft_layers, p.x.split(p.sizes), strict=True)]),
        "PEFT adapter_names": lambda: p.peft_layer(p.batch, adapter_names=names).flatten(0, 1),
    }
    if device == "cpu" and not torch.equal(alone["pymape"](), p.loop()):
        raise RuntimeError(f"segmented_lora does not have the bits of the loop at {label}")
    exact = [x.double() for x in (p.x, p.base, p.lora_a, p.lora_b)]
    layer_alone = {"frozen layer alone": lambda: p.layer(p.x)}
    for part, providers, unchecked in (("adapters alone", alone, {}), ("whole layer", whole, layer_alone)):
        cases = compare(
            f"{label}, {part}",
            providers,
            exact=lambda: segmented_lora_reference(*exact, *p.given()[2:]),
            tolerance=1e-5 if dtype == torch.float32 else 2e-2,
            unchecked=unchecked,
            seconds=0.4,
        )
        if providers is alone:
            add_rates(cases, device, dtype, operations=4 * p.x.numel() * RANK)
        report.add(cases)
