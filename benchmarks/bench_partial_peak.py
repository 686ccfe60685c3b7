"""Peak memory and work of a partial step at 1.1 B parameters in bf16, counted on tensors without data.

The steps of `bench_partial` as a GPU would run them, on torch's fake tensors: what is allocated and multiplied follows
from shapes alone, so that no GPU is needed and nothing is timed. Not counted are the workspaces of products and what
the allocator rounds up.
"""

from __future__ import annotations

import argparse
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_partial import (
    CHECKPOINTED,
    FUSED_DENSE,
    LAYERS,
    dense_step,
    fused_dense_step,
    make_batch,
    make_model,
    partial_step,
)
from benchmarks.harness import Case, Report

DEVICE = "cpu"
STEPS: dict[str, Callable[..., Any]] = {
    "masked gradients": dense_step,
    FUSED_DENSE: fused_dense_step,
    "partial, original code": functools.partial(partial_step, fused=False),
    "partial": functools.partial(partial_step, fused=True),  # as on a GPU
}


def run(report: Report, options: argparse.Namespace) -> None:
    report.notes += [
        "the sizes of `bench_partial` on a GPU: 8 x 512 tokens, budget 10 %, bf16, fused AdamW; the second step of two",
        "between GB: what lives between steps: weights, gradients and optimizer state, and the masks of masked "
        "gradients; peak GB: the most that lives at a time; TFLOP: of the products of a step, attention included",
        "partial: norms and gated feed-forward blocks are fused, as by default on a GPU; original code: they are not, "
        "and keep more for the backward pass",
        "x peak: over masked gradients; x fused peak: over masked gradients with the same fused parts",
        "checkpointed: activations inside the layers are computed anew in the backward pass, in all kinds of steps",
    ]
    for suffix in ("", CHECKPOINTED):
        report.add(count(LAYERS["cuda"]["llama"], suffix))


def count(layers: int, suffix: str = "") -> list[Case]:
    """All kinds of steps, as cases without times.

    Of `bench_partial`'s models the Llama alone: BERT's dropout makes torch take another attention on a CPU, which keeps
    all probabilities.
    """
    cases = [
        Case(f"llama {layers} layers{suffix}", kind, figures=figures_of_step(make_step, layers, bool(suffix)))
        for kind, make_step in STEPS.items()
    ]
    dense, fused, *ours = (case.figures for case in cases)
    ours[-1]["x fused peak"] = ours[-1]["peak GB"] / fused["peak GB"]
    for one in (fused, *ours):
        one |= {"x peak": one["peak GB"] / dense["peak GB"], "x TFLOP": one["TFLOP"] / dense["TFLOP"]}
    return cases


def figures_of_step(make_step: Callable[..., Any], layers: int, checkpointed: bool) -> dict[str, float]:
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # masks and their indices are real
    with fake:
        model = make_model("llama", layers, "cuda", on="cpu")
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # No mask of ones: a GPU step finds that it hides nothing, which takes data.
    batch = {name: fake.from_tensor(x) for name, x in make_batch("llama", "cuda", on="cpu").items()}
    del batch["attention_mask"]
    # The digest for a delta file reads the weights.
    with (
        mock.patch("pymape.partial.inside_digest", return_value=""),
        LiveBytes([*model.parameters(), *model.buffers()]) as live,
    ):
        step, _ = make_step(model, batch)
        step()
        between = live.now
        live.peak = 0
        step()
        peak = live.peak
        # In a step of its own, because the counter keeps what passes the modules.
        with FlopCounterMode(display=False, custom_mapping={torch.ops.pymape.selected_weight_grad: _products}) as work:
            step()
    return {"between GB": between / 1e9, "peak GB": peak / 1e9, "TFLOP": work.get_total_flops() / 1e12}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, and the most that are alive at a time.

    torch's own MemTracker cannot be used: it hooks every module's tensors, and refuses those that need no gradient.

    Args:
        tensors: what is alive already.
    """

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._count(tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count(tree_leaves(result))
        return result

    def _count(self, results: Sequence[Any]) -> None:
        for storage in (result.untyped_storage() for result in results if isinstance(result, Tensor)):
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, address: int) -> None:
        self.now -= self._sizes.pop(address)


def _products(x: Sequence[int], dy: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Operations of `selected_weight_grad`: for each entry of its result a sum over the tokens."""
    return 2 * x[0] * out_shape[0] * out_shape[1]
