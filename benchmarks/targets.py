"""What the GPU kernels are meant to reach, and how each figure is read from the benchmarks' results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.harness import finished

__all__ = ["TARGETS", "Target", "table"]

Reports = Mapping[str, Mapping[str, Any]]  # part of `benchmarks.gpu` -> what its benchmark wrote
Figures = list[float | None]
_NOISE = 0.98  # of two equally fast calls, either median of fifty rounds or more may come out this much behind


@dataclass(frozen=True)
class Target:
    """One figure of the benchmarks; the worst of `found` counts.

    Args:
        operator: what is measured.
        text: the target in words.
        parts: the parts of `make gpu` that measure it.
        found: the figures of these parts' reports; None for each that is missing, as where a contender cannot run.
        least, most: what they must be.
    """

    operator: str
    text: str
    parts: tuple[str, ...]
    found: Callable[[Sequence[Mapping[str, Any]]], Figures]
    least: float | None = None
    most: float | None = None

    def measured(self, reports: Reports) -> str:
        """What a table says: the worst figure and whether it is good enough, once all parts have run."""
        if not all(part in reports for part in self.parts):
            return "not yet measured"
        wanted = self.found([case for part in self.parts for case in reports[part]["cases"]])
        figures = [figure for figure in wanted if figure is not None]
        whole = all(finished(reports[part]) for part in self.parts)
        if not figures:
            return "not measured: no such case ran" if whole else "not yet measured"
        worst = min(figures) if self.least is not None else max(figures)
        reached = worst >= self.least if self.least is not None else worst <= (self.most or 0.0)
        shown = f" in {len(figures)} of {len(wanted)} cases, the others did not run" if None in wanted else ""
        if not whole:
            shown += "; cut off, the rest is not yet measured"
        return f"{worst:.3g}, {'reached' if reached else '**missed**'}{shown}"


def table(reports: Reports) -> str:
    """Return the targets as a Markdown table, with what has been measured."""
    rows = []
    for target in TARGETS:
        command = f'`make gpu PARTS="{" ".join(target.parts)}"`'
        rows.append(f"| {target.operator} | {target.text} | {target.measured(reports)} | {command} |")
    return "\n".join(["| what | target | measured | command |", "| --- | --- | --- | --- |", *rows]) + "\n"


def _figures(
    figure: str, provider: str | tuple[str, ...], *shapes: str
) -> Callable[[Sequence[Mapping[str, Any]]], Figures]:
    """A figure of the providers' cases, for every one of `shapes`: a whole shape, in which * stands for any text."""
    providers = (provider,) if isinstance(provider, str) else provider

    def find(cases: Sequence[Mapping[str, Any]]) -> Figures:
        found: Figures = []
        for shape in shapes:
            asked = [case for case in cases if case["provider"] in providers and fnmatchcase(case["shape"], shape)]
            found += [case["figures"].get(figure) for case in asked] or [None]
        return found

    return find


def _seconds(provider: str, shape: str) -> Callable[[Sequence[Mapping[str, Any]]], Figures]:
    return lambda cases: [c["median_s"] for c in cases if c["provider"] == provider and fnmatchcase(c["shape"], shape)]


def _long(tokens: Sequence[int]) -> Iterator[str]:
    return (f"step, *x{count}x{size}, causal *" for count in tokens for size in (64, 128))


_LARGE = ("RoBERTa-large filters *", "Llama-3-8B filters *")
_SMALL_WIDTHS = tuple(f"block step, {name} *" for name in ("BERT-base", "RoBERTa-large", "ViT-B/16", "GPT-2"))
_ATTENTION = ("attention_encoders", "attention_decoders", "attention_short", "attention_long")

TARGETS = (
    Target(
        "`module_scores`",
        "at least 85 % of the measured copy bandwidth",
        ("module_scores",),
        _figures("% of copy", "pymape", *_LARGE),
        least=85,
    ),
    Target(
        "`module_scores`",
        "at least 1.9 x as fast as eager in bf16",
        ("module_scores",),
        _figures("x pymape", "eager", *_LARGE),
        least=1.9,
    ),
    Target(
        "`module_scores`",
        "at least 3 x as fast as eager that accumulates in fp32",
        ("module_scores",),
        _figures("x pymape", "eager, fp32 sums", *_LARGE),
        least=3,
    ),
    Target(
        "`masked_attention`",
        "forward + backward + scores at least as fast as flash SDPA with gate and scores, up to 2048 tokens",
        ("attention_short", "attention_long"),
        _figures("x pymape", "SDPA flash, gate", *_long((512, 1024, 2048))),
        least=1,
    ),
    Target(
        "`masked_attention`",
        "at least 0.75 x as fast as with cuDNN's attention at 8192 tokens, head sizes 64 and 128",
        ("attention_long",),
        _figures("x pymape", "SDPA cuDNN, gate", *_long((8192,))),
        least=0.75,
    ),
    Target(
        "`masked_attention`",
        "`auto` never slower than the best composition: Triton, or SDPA with the CUDA gate and score (2 % for noise)",
        _ATTENTION,
        _figures("x pymape", ("pymape, triton", "pymape, cuda"), "step, *"),
        least=_NOISE,
    ),
    Target(
        "`masked_attention`",
        "half of the heads gated off: forward at least 1.7 x faster than with none",
        ("attention_closed",),
        _figures("x faster with half closed", "pymape, half of the heads closed", "forward, *"),
        least=1.7,
    ),
    Target(
        "`masked_ffn`",
        "forward + backward + scores at least 1.25 x as fast as eager at widths up to 1024",
        ("ffn_block",),
        _figures("x pymape", "eager", *_SMALL_WIDTHS),
        least=1.25,
    ),
    Target(
        "`masked_ffn`",
        "the same at Llama-3-8B's width: at least 1.03 x",
        ("ffn_block",),
        _figures("x pymape", "eager", "block step, Llama-3-8B *"),
        least=1.03,
    ),
    Target(
        "`masked_ffn`",
        "not slower than torch.compile (2 % for noise)",
        ("ffn_block",),
        _figures("x pymape", "torch.compile", "block step, *"),
        least=_NOISE,
    ),
    Target(
        "importance pass",
        "at most 1.10 x a plain forward and activation backward under the fastest stock attention",
        ("importance",),
        _figures("x inputs", "pymape", "* records, *"),
        most=1.1,
    ),
    Target(
        "`greedy_swap`",
        "Llama-3-8B, 32 x 14336, 256 samples of each kind, at most 400 swaps a layer: under 0.5 s",
        ("greedy_swap",),
        _seconds("pymape", "swap 32x14336, 256 *"),
        most=0.5,
    ),
    Target(
        "partial step",
        "10 % budget, 4,096 tokens, Llama-type model of 1.1 B parameters: at least 1.5 x as fast as masked gradients",
        ("partial_llama",),
        _figures("speed-up", "partial", "llama 22 layers"),
        least=1.5,
    ),
    *(
        Target(
            "partial step",
            f"the same, {activations}: peak memory of everything at most 0.5 x that of masked gradients",
            ("partial_llama",),
            _figures("x peak", "partial", f"llama 22 layers, memory{suffix}"),
            most=0.5,
        )
        for activations, suffix in (("activations kept", ""), ("activations computed anew in both", ", checkpointed"))
    ),
)
