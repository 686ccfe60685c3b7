"""Other tiles for the Triton kernels of attention and of the feed-forward block, timed against those in their tables.

The tables hold one tile for every kernel, dtype and head size, so that results never depend on a race. This is the way
to a better table: a short list for every kernel, of tiles that fit when compiled for sm_90. Some spill registers, but
outside their loops, and may be the fastest all the same.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks.harness import Case, Report, add_rates, compare
from benchmarks.shapes import LAYERS

DEVICE = "cuda"
# (BLOCK_M, BLOCK_N, warps, stages) by kernel and head size
ATTENTION = {
    ("fwd", 64): ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)),
    ("fwd", 128): ((64, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)),
    ("bwd_query", 64): ((64, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 3)),
    ("bwd_query", 128): ((64, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
    ("bwd_key_value", 64): ((64, 64, 4, 2), (64, 32, 8, 2), (32, 64, 4, 3), (64, 64, 8, 2)),
    ("bwd_key_value", 128): ((32, 64, 4, 2), (32, 128, 8, 2), (32, 64, 8, 3), (16, 64, 8, 2)),
}
# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages[, most registers of a thread]) by whether a tile has one projection and one
# row of gates, as in the launcher's table, which also fixes BLOCK_M
FFN = {
    True: ((128, 128, 64, 8, 4), (128, 128, 64, 8, 3, 128), (128, 256, 64, 8, 3), (128, 64, 64, 8, 4)),
    False: ((128, 128, 64, 8, 3), (128, 64, 64, 8, 3, 128), (128, 64, 64, 8, 4), (128, 32, 64, 8, 4)),
}
BATCH, TOKENS, WIDTH, DTYPE = 4, 2048, 2048, torch.bfloat16


def run(report: Report, options: argparse.Namespace) -> None:
    device = report.device
    report.notes += [
        f"attention: {BATCH} x {TOKENS} tokens, width {WIDTH}, causal, {str(DTYPE)[6:]}, gates that learn; a backward "
        "kernel together with the one for its row sums",
        "ffn: a forward that keeps the projections, gates per sample; x pymape is over the tile of the table",
    ]
    for (kernel, size), tiles in ATTENTION.items():
        report.add(_attention(kernel, size, tiles, device))
    for name in LAYERS:
        report.add(_ffn(name, device))


def _attention(kernel: str, size: int, tiles: Sequence[tuple[int, ...]], device: str) -> list[Case]:
    from pymape.kernels import masked_attention as forward
    from pymape.kernels import masked_attention_backward as backward

    call = _attention_call(kernel, size, device)
    own = forward.tile_of

    def with_tile(tile: tuple[int, ...]) -> list[torch.Tensor]:
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        changed = dict(zip(names, tile, strict=True))
        # Both launchers look the function up in their own module.
        with (
            mock.patch.object(forward, "tile_of", lambda kernel, query: own(kernel, query) | changed),
            mock.patch.object(backward, "tile_of", lambda kernel, query: own(kernel, query) | changed),
        ):
            return call()

    providers: dict[str, Callable[[], Any]] = {"as in the table": call}
    providers |= {_label(tile): functools.partial(with_tile, tile) for tile in tiles}
    cases = compare(f"attention {kernel}, head size {size}", providers, tolerance=2e-2, seconds=0.4)
    pairs = BATCH * (WIDTH // size) * TOKENS * TOKENS // 2
    products = {"fwd": 2, "bwd_query": 3, "bwd_key_value": 4}[kernel]
    add_rates(cases, device, DTYPE, operations=2 * products * pairs * size)
    return cases


def _attention_call(kernel: str, size: int, device: str) -> Callable[[], list[torch.Tensor]]:
    """What launches one kernel, and returns the tensors that it fills."""
    from pymape.kernels.masked_attention import masked_attention_forward
    from pymape.kernels.masked_attention_backward import masked_attention_backward

    heads = WIDTH // size
    query, key, value, grad = (
        torch.randn(BATCH, TOKENS, heads, size, device=device).to(DTYPE).transpose(1, 2) for _ in range(4)
    )
    inputs = query, key, value, torch.rand(BATCH, heads, device=device), None
    options = True, size**-0.5, True  # causal, scale, gates that learn
    if kernel == "fwd":
        return lambda: list(masked_attention_forward(*inputs, *options))
    _, *kept = masked_attention_forward(*inputs, *options)
    wanted = kernel == "bwd_query", kernel == "bwd_key_value"
    return lambda: [x for x in masked_attention_backward(grad, *inputs, *kept, *options, *wanted) if x.numel()]


def _ffn(name: str, device: str) -> list[Case]:
    from pymape.kernels import masked_ffn as kernels

    layer = LAYERS[name]
    batch, tokens = layer.samples_and_tokens(device)
    size = DTYPE.itemsize
    x = torch.randn(batch, tokens, layer.width, device=device).to(DTYPE)
    weight, up_weight = (torch.randn(2, layer.filters, layer.width, device=device) * layer.width**-0.5).to(DTYPE)
    gate = torch.rand(batch, layer.filters, device=device)
    hidden = [torch.empty(batch, tokens, layer.filters, device=device, dtype=DTYPE) for _ in range(3)]
    simple = not layer.gated and tokens % kernels._BLOCK_M[size] == 0

    def call() -> torch.Tensor:
        kernels.masked_ffn_forward(
            x, weight, None, up_weight if layer.gated else None, None, gate, layer.activation, True, False, *hidden
        )
        return hidden[0]

    def with_tile(tile: tuple[int, ...]) -> torch.Tensor:
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "maxnreg")
        with mock.patch.dict(kernels._TILES, {(simple, size): dict(zip(names, tile, strict=False))}):
            return call()

    providers: dict[str, Callable[[], Any]] = {"as in the table": call}
    providers |= {_label(tile): functools.partial(with_tile, tile) for tile in FFN[simple]}
    label = f"ffn, {name} {batch * tokens}x{layer.width} to {layer.filters}"
    # All write to the same tensors, so that what the others are held against must be a copy.
    cases = compare(label, providers, exact=lambda: call().clone(), tolerance=2e-2, seconds=0.4)
    products = 2 * batch * tokens * layer.width * layer.filters * (1 + layer.gated)
    add_rates(cases, device, DTYPE, operations=products)
    return cases


def _label(tile: tuple[int, ...]) -> str:
    # Of five numbers or six the first three are of the block, of four the first two.
    blocks, (warps, stages, *registers) = (tile[:3], tile[3:]) if len(tile) > 4 else (tile[:2], tile[2:])
    most = f", {registers[0]} registers" if registers else ""
    return f"{'x'.join(map(str, blocks))}, {warps} warps, {stages} stages{most}"
