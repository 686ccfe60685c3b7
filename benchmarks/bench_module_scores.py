"""module_scores against eager torch, and against the rate at which torch copies memory in the same run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.harness import Case, Report, alternate, gigabytes_per_second
from pymape.ops import module_scores, module_scores_reference

SHAPES = {
    "BERT-base FFN": (32, 128, 3072),
    "BERT-base heads": (32, 128, 12, 64),
    "ViT-B/16 FFN": (16, 197, 3072),
    "beyond the caches": (64, 256, 3072),
}


def run(device: str, arguments: Sequence[str] = ()) -> Report:
    report = Report("module_scores", device)
    for name, shape in SHAPES.items():
        report.cases += _compare(name, shape, device)
    return report


def _compare(name: str, shape: tuple[int, ...], device: str) -> list[Case]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    output, grad = torch.randn(2, *shape, device=device).to(dtype)
    torch.testing.assert_close(module_scores(output, grad), module_scores_reference(output, grad), rtol=1e-3, atol=1e-2)
    dims = (1,) if len(shape) == 3 else (1, 3)
    copy = torch.empty_like(output)
    ours, eager, copied = alternate(
        f"{name} {'x'.join(map(str, shape))}",
        {
            "pymape": lambda: module_scores(output, grad),
            "(grad * out).sum": lambda: (grad * output).sum(dims),
            "copy_": lambda: copy.copy_(output),
        },
    )
    moved = 2 * output.numel() * output.element_size()  # two tensors read; for copy_, one read and one written
    for case in (ours, copied):
        case.figures["GB/s"] = gigabytes_per_second(case, moved)
    ours.figures["speed-up"] = eager.median_s / ours.median_s
    return [ours, eager, copied]
