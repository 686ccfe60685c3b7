"""segmented_lora against what PEFT does for several adapters, and against batched products over padded segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import peft
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness import Report, alternate
from pymape.ops import segmented_lora

TOKENS, RANK = 128, 16
# width of the layer, samples of every segment, tokens of a sample
CASES = {
    "BERT-base": (768, (8,) * 5, TOKENS),
    "BERT-base, uneven": (768, (16, 1, 9, 3, 11), TOKENS),
    "BERT-base, one token": (768, (1,) * 5, 1),
    "TinyLlama-1.1B": (2048, (4,) * 5, TOKENS),
}


def run(device: str, arguments: Sequence[str] = ()) -> Report:
    report = Report("segmented_lora", device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    report.notes += [
        f"rank {RANK}, five adapters, square layers, {str(dtype)[6:]}; on CPU pymape's bits are those of PEFT's layers",
        "adapters alone: the frozen layer's output is given; PEFT's modules lora_A and lora_B in a loop",
        "whole layer: with the frozen layer; PEFT's lora.Linear, one per segment, or one for all with adapter_names",
    ]
    for name, (width, samples, tokens) in CASES.items():
        with torch.inference_mode():
            _compare(report, f"{name} {'+'.join(map(str, samples))} x {tokens}", width, samples, tokens, dtype, device)
    return report


def make_layer(width: int, adapters: int, dtype: torch.dtype, device: str) -> peft.tuners.lora.Linear:
    """A frozen linear layer with this many adapters "0", "1", ... as PEFT makes them."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, use_rslora=True, init_lora_weights=False)
    layer = peft.tuners.lora.Linear(nn.Linear(width, width), "0", config, r=RANK, lora_alpha=RANK)
    for adapter in range(1, adapters):
        layer.update_layer(str(adapter), RANK, lora_alpha=RANK, config=config)
    return layer.to(device, dtype).eval()


def _compare(
    report: Report, label: str, width: int, samples: Sequence[int], tokens: int, dtype: torch.dtype, device: str
) -> None:
    adapters = len(samples)
    layer = make_layer(width, adapters, dtype, device)
    names = [str(adapter) for adapter in range(adapters)]
    lora_a = torch.stack([layer.lora_A[name].weight for name in names])
    lora_b = torch.stack([layer.lora_B[name].weight for name in names])
    scale = [layer.scaling[name] for name in names]
    single = [make_layer(width, 1, dtype, device) for _ in names]
    for name, other in zip(names, single, strict=True):
        other.base_layer = layer.base_layer
        other.lora_A["0"], other.lora_B["0"] = layer.lora_A[name], layer.lora_B[name]
        other.scaling["0"] = layer.scaling[name]
    sizes = [count * tokens for count in samples]
    offsets = [0, *accumulate(sizes)]
    batch = torch.randn(sum(samples), tokens, width, device=device).to(dtype)
    x = batch.flatten(0, 1)
    per_sample = [name for name, count in zip(names, samples, strict=True) for _ in range(count)]
    base = layer.base_layer(x)

    def ours(base: Tensor) -> Tensor:
        return segmented_lora(x, base, lora_a, lora_b, offsets, range(adapters), scale)

    def loop() -> Tensor:
        parts = zip(names, x.split(sizes), base.split(sizes), strict=True)
        return torch.cat([y + layer.lora_B[a](layer.lora_A[a](part)) * layer.scaling[a] for a, part, y in parts])

    def padded() -> Tensor:
        even = len(set(sizes)) == 1
        rows = x.view(adapters, -1, width) if even else pad_sequence(x.split(sizes), batch_first=True)
        given = base.view(adapters, -1, width) if even else pad_sequence(base.split(sizes), batch_first=True)
        result = torch.baddbmm(given, rows @ lora_a.transpose(1, 2), lora_b.transpose(1, 2), alpha=scale[0])
        if even:
            return result.view(-1, width)
        return torch.cat([part[:size] for part, size in zip(result, sizes, strict=True)])

    alone: dict[str, Callable[[], Tensor]] = {"pymape": lambda: ours(base), "PEFT loop": loop, "padded bmm": padded}
    whole: dict[str, Callable[[], Tensor]] = {
        "pymape": lambda: ours(layer.base_layer(x)),
        "PEFT loop": lambda: torch.cat([one(part) for one, part in zip(single, x.split(sizes), strict=True)]),
        "PEFT adapter_names": lambda: layer(batch, adapter_names=per_sample).flatten(0, 1),
        "frozen layer alone": lambda: layer.base_layer(x),
    }
    expected = loop()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if device == "cpu" else {"rtol": 3e-2, "atol": 3e-2}
    for contender in (*alone.values(), *list(whole.values())[:-1]):
        torch.testing.assert_close(contender(), expected, **tolerance)
    if device == "cpu" and not torch.equal(ours(base), expected):
        raise RuntimeError(f"segmented_lora does not have the bits of PEFT's layers at {label}")

    for part, contenders in (("adapters alone", alone), ("whole layer", whole)):
        cases = alternate(f"{label}, {part}", contenders)
        for case in cases[1:]:
            case.figures["x pymape"] = case.median_s / cases[0].median_s
        if contenders is alone:
            cases[0].figures["GFLOP/s"] = 4 * x.numel() * RANK / cases[0].median_s / 1e9
        report.cases += cases
