"""A partial training step against the usual masked-gradient step, and against what it cannot do without.

The masked-gradient step computes all gradients, zeroes them outside the masks and steps AdamW over everything;
embeddings and LM head are frozen in both. What no partial step can save is the forward pass, the backward pass to the
lowest selected projections, and the gradients of the selected rows and columns; their time bounds the speed-up that is
possible. Memory is measured twice: as the steps are, and with gradient checkpointing in both, because most
activations are needed in a partial step too. On a GPU, `llama` is TinyLlama-1.1B with all its layers in bf16.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.harness import Case, Report, alternate
from pymape import FrozenPrefix, ModuleMasks, PartialParameters, PrefixCache, layout, selected_weight_grad
from pymape.forward import unlabelled
from pymape.fused import FusedParts
from pymape.losses import per_sample_loss
from pymape.model_layout import find_layers

BATCH, BUDGET = 8, 0.1
CHECKPOINTED = ", checkpointed"
LAYERS = {"cpu": {"bert": 12, "llama": 4}, "cuda": {"bert": 12, "llama": 22}}
TOKENS = {"cpu": 128, "cuda": 512}  # of a sample
VOCABULARY = {"cpu": 1000, "cuda": 32000}  # small on a CPU, because embeddings are no module of a mask
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
FUSED_DENSE = "masked gradients, fused"
# Partial steps that do not leave `fused` to the device.
OTHER = {"partial, fused": True, "partial, original code": False}


def _layer_count(text: str) -> int:
    if (count := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, of which the lower half is a prefix, got {count}")
    return count


def add_options(parser: argparse.ArgumentParser, device: str) -> None:
    parser.add_argument("--models", nargs="+", choices=sorted(LAYERS[device]), default=sorted(LAYERS[device]))
    parser.add_argument(
        "--layers", type=_layer_count, help="default: 12 of BERT-base; of TinyLlama-1.1B 4, and all 22 on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)


def run(report: Report, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    device = report.device
    report.notes += [
        f"{BATCH} x {TOKENS[device]} tokens, budget {BUDGET:.0%}, {str(DTYPE[device])[6:]}, fused AdamW, train mode; "
        f"{options.rounds} rounds",
        "of possible: (needed passes + selected weight gradients) / step, all medians of the same alternating rounds",
        "memory: highest resident size of a process of two steps (on a GPU: allocated by torch), less that before the "
        "model was made; gradients + state: what the optimizer holds and is given",
        "checkpointed: activations inside the layers are computed anew in the backward pass, in all kinds of steps",
        "fused: RMS norms and gated feed-forward blocks (BERT has neither) in fused operators, the default on a GPU",
    ]
    for name in options.models:
        layers = options.layers or LAYERS[device][name]
        _check(name, min(layers, 2), device)
        compare_steps(report, name, layers, options.rounds, device)
        compare_memory(report, name, layers, options.threads, device)


def make_model(
    name: str, layers: int, device: str = "cpu", dtype: torch.dtype | None = None, on: str | None = None
) -> Any:
    """Layers of BERT-base or TinyLlama-1.1B, of the size and, unless another is given, in the dtype for a device.

    It lies there, or `on` another one.
    """
    vocabulary = VOCABULARY[device]
    if name == "bert":
        config = transformers.BertConfig(num_hidden_layers=layers, vocab_size=vocabulary, attn_implementation="sdpa")
        kind: Any = transformers.AutoModelForSequenceClassification
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=layers, vocab_size=vocabulary, hidden_size=2048, intermediate_size=5632,
            num_attention_heads=32, num_key_value_heads=4, attn_implementation="sdpa", use_cache=False,
        )  # fmt: skip
        kind = transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]), torch.device(on or device):
        torch.manual_seed(0)
        return kind.from_config(config, dtype=dtype or DTYPE[device]).train()


def make_batch(name: str, device: str = "cpu", on: str | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY[device], (BATCH, TOKENS[device]), generator=generator)
    labels = ids if name == "llama" else torch.arange(BATCH) % 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(on or device) for key, value in batch.items()}


def mean_loss(model: nn.Module, batch: dict[str, Tensor], run: Callable[..., Any] | None = None) -> Tensor:
    """The loss that objectives are made of; the model's own holds several copies of its logits in fp32."""
    return per_sample_loss(model, batch, (run or model)(**unlabelled(batch))).mean()


def make_masks(model: nn.Module, place: str) -> ModuleMasks:
    """Random modules for the whole budget, in all layers or in the upper half of them only."""
    shape = layout(model)
    generator = torch.Generator().manual_seed(0)
    heads, filters = (torch.rand(shape.layers, width, generator=generator) for width in (shape.kv_heads, shape.filters))
    # Heads and filters in proportion to what they own: the scan of `from_scores` would prefer the cheaper kind.
    scores = [heads * shape.head_cost, filters * shape.filter_cost]
    if place == "upper half":
        for score in scores:
            score[: shape.layers // 2] = -1
    return ModuleMasks.from_scores(scores[0], scores[1], shape, BUDGET)


def dense_step(model: Any, batch: dict[str, Tensor], place: str = "anywhere") -> tuple[Callable[[], None], Any]:
    """The masked-gradient step and its optimizer."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inside = {parameter: torch.zeros_like(parameter, dtype=torch.bool) for parameter in trained}
    masks = make_masks(model, place)
    for layer, groups, filters in zip(find_layers(model), masks.head_groups, masks.filters, strict=True):
        slices = layer.head_slices(groups.nonzero()[:, 0]) + layer.filter_slices(filters.nonzero()[:, 0])
        for module, name, dim, index in slices:
            inside[getattr(module, name)].index_fill_(dim, index.to(batch["input_ids"].device), True)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        mean_loss(model, batch).backward()
        for parameter, mask in inside.items():
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        optimizer.step()

    return step, optimizer


def fused_dense_step(model: Any, batch: dict[str, Tensor]) -> tuple[Callable[[], None], Any]:
    """The masked-gradient step with the fused parts of a partial step, whose norms are frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    FusedParts(model, 0, ("cuda", "cpu")).fuse()
    return dense_step(model, batch)


def partial_step(
    model: Any,
    batch: dict[str, Tensor],
    place: str = "anywhere",
    cache: PrefixCache | None = None,
    fused: bool | None = None,
) -> tuple[Callable[[], None], Any]:
    """The same with compact parameters, and with the frozen layers' states from the cache if there is one."""
    partial = PartialParameters(model, make_masks(model, place), fused=fused)
    optimizer = torch.optim.AdamW(partial.parameters(), lr=1e-5, fused=True)
    partial.attach(optimizer)
    prefix = None if cache is None else FrozenPrefix(model, partial.lowest_layer or 0, cache)
    records = [str(row) for row in range(BATCH)]
    run = None if prefix is None else lambda **inputs: prefix.run(records, inputs)

    def step() -> None:
        optimizer.zero_grad()
        mean_loss(model, batch, run).backward()
        optimizer.step()

    return step, optimizer


def others(name: str, device: str) -> list[str]:
    """The partial step that is not the device's default; BERT has nothing to fuse."""
    return [] if name == "bert" else ["partial, fused" if device == "cpu" else "partial, original code"]


def needed_passes(model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward, and backward to the outputs of the lowest projections, with frozen weights."""
    model.requires_grad_(False)
    lowest = find_layers(model)[0]
    leaves: list[Tensor] = []
    for module in (lowest.query, lowest.key, lowest.value):
        assert module is not None
        module.register_forward_hook(lambda module, args, output: leaves.append(output.requires_grad_()))

    def step() -> None:
        leaves.clear()
        torch.autograd.grad(mean_loss(model, batch), leaves)

    return step


def needed_weight_gradients(model: Any, device: str) -> Callable[[], None]:
    """The gradients of all selected rows and columns, from inputs of the right shapes."""
    jobs: dict[nn.Module, tuple[int, list[Tensor]]] = {}
    masks = make_masks(model, "anywhere")
    for layer, groups, filters in zip(find_layers(model), masks.head_groups, masks.filters, strict=True):
        slices = layer.head_slices(groups.nonzero()[:, 0]) + layer.filter_slices(filters.nonzero()[:, 0])
        for module, name, dim, index in slices:
            if name == "weight" and len(index):
                jobs.setdefault(module, (dim, []))[1].append(index.to(device))
    rows = BATCH * TOKENS[device]
    sizes = {size for module in jobs for size in module.weight.shape}
    drawn = {size: torch.randn(rows, size, device=device).to(DTYPE[device]) for size in sizes}

    def step() -> None:
        for module, (dim, parts) in jobs.items():
            outputs, inputs = (drawn[size] for size in module.weight.shape)
            selected_weight_grad(inputs, outputs, torch.cat(parts), "columns" if dim else "rows")

    return step


def compare_steps(report: Report, name: str, layers: int, rounds: int, device: str) -> None:
    batch = make_batch(name, device)
    with tempfile.TemporaryDirectory() as folder:
        cache = PrefixCache(folder)
        contenders = {
            "masked gradients": dense_step(make_model(name, layers, device), batch)[0],
            **({FUSED_DENSE: fused_dense_step(make_model(name, layers, device), batch)[0]} if name != "bert" else {}),
            "partial": partial_step(make_model(name, layers, device), batch)[0],
            **{
                kind: partial_step(make_model(name, layers, device), batch, fused=OTHER[kind])[0]
                for kind in others(name, device)
            },
            "needed passes": needed_passes(make_model(name, layers, device), batch),
            "needed weight gradients": needed_weight_gradients(make_model(name, layers, device), device),
            "partial, upper half": partial_step(make_model(name, layers, device), batch, "upper half")[0],
            "upper half, cached": partial_step(make_model(name, layers, device), batch, "upper half", cache)[0],
        }
        cases = alternate(f"{name} {layers} layers", contenders, seconds=0, least=rounds)
    by_kind = {case.provider: case for case in cases}
    dense, ours, cached = (by_kind[kind] for kind in ("masked gradients", "partial", "upper half, cached"))
    for case in cases:
        if case is not dense and not case.provider.startswith("needed"):
            case.figures["speed-up"] = dense.median_s / case.median_s
    needed = by_kind["needed passes"].median_s + by_kind["needed weight gradients"].median_s
    ours.figures |= {"possible": dense.median_s / needed, "of possible": needed / ours.median_s}
    cached.figures["x uncached"] = by_kind["partial, upper half"].median_s / cached.median_s
    report.add(cases)


def compare_memory(report: Report, name: str, layers: int, threads: int, device: str) -> None:
    """Each kind of step in a process of its own, with activations kept and with activations computed anew."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()  # the models that were measured are gone, and their memory is the processes' now
    for suffix in ("", CHECKPOINTED):
        measured = {}
        for kind in ("masked gradients", "partial", *others(name, device)):
            arguments = [name, kind + suffix, str(layers), str(threads), device]
            # Fixed thresholds: freed tensors go back to the system at once, and the resident size is what is in use.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            command = [sys.executable, "-m", "benchmarks.bench_partial", *arguments]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            measured[kind] = json.loads(output)
        report.add(_memory_cases(f"{name} {layers} layers, memory{suffix}", measured))


def _memory_cases(shape: str, measured: Mapping[str, Mapping[str, float]]) -> list[Case]:
    dense = next(iter(measured.values()))
    cases = []
    for kind, values in measured.items():
        figures = {"gradients + state MB": values["state"] / 1e6, "peak MB": values["peak"] / 1e6}
        if values is not dense:
            figures |= {"x state": values["state"] / dense["state"], "x peak": values["peak"] / dense["peak"]}
        cases.append(Case(shape, kind, *[values["seconds"]] * 3, figures))
    return cases


def measure_memory(name: str, kind: str, layers: int, device: str) -> dict[str, float]:
    """Two steps: bytes of gradients and optimizer state, and of the highest point above where the process began."""
    batch = make_batch(name, device)
    # A first step of one layer loads code and starts threads, which belong to neither kind.
    dense_step(make_model(name, 1, device), batch)[0]()
    gc.collect()
    cuda = device != "cpu"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
    before = torch.cuda.memory_allocated() if cuda else _resident("VmRSS")
    model = make_model(name, layers, device)
    if kind.endswith(CHECKPOINTED):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind.startswith("masked gradients"):
        step, optimizer = dense_step(model, batch)
    else:
        step, optimizer = partial_step(model, batch, fused=OTHER.get(kind.removesuffix(CHECKPOINTED)))
    start = time.perf_counter()
    for _ in range(2):
        step()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / 2
    peak = (torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")) - before
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    tensors += [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return {"state": sum(tensor.nbytes for tensor in tensors), "peak": peak, "seconds": seconds}


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _check(name: str, layers: int, device: str) -> None:
    """The compact gradients are the selected rows and columns of the full ones, and the cache changes no bit."""
    batch = make_batch(name, device)
    dense, model = (make_model(name, layers, device, torch.float32).eval() for _ in range(2))
    expected = dense(**batch)
    expected.loss.backward()
    for fused in (False, True):
        partial = PartialParameters(model, make_masks(model, "anywhere"), fused=fused)
        model(**batch).loss.backward()
        for one, other in zip(model.modules(), dense.modules(), strict=True):
            if getattr(one, "selected_weight", None) is not None:
                full = other.weight.grad if one.selected_axis == "rows" else other.weight.grad.t()
                torch.testing.assert_close(one.selected_weight.grad, full[one.selected_index], rtol=1e-3, atol=1e-5)
        partial.merge()
    model.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        prefix = FrozenPrefix(model, 1, PrefixCache(folder))
        for _ in range(2):
            outputs = prefix.run([str(row) for row in range(BATCH)], batch)
            torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=0 if device == "cpu" else 1e-5)


if __name__ == "__main__":
    _name, _kind, _layers, _threads, _device = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    print(json.dumps(measure_memory(_name, _kind, int(_layers), _device)))
