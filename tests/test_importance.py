"""importance: equal to one autograd pass per sample, whatever the batches; its storage; its bad input."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_zoo import DECODERS, ENCODERS, GROUPED, VISION, tiny_batch, tiny_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from pymape.data.batching import LengthBucketSampler, PaddingCollator, RecordBatches
from pymape.forward import padding_token
from pymape.gradient_pass import BatchScores, GradientPass
from pymape.importance import Importance, importance
from pymape.metrics.scores import record_scores
from pymape.model_layout import find_layers, layout
from pymape.modules import instrument, is_instrumented, set_gates

COUNT = 5
HEADS, FILTERS = 4, 25
TEXT = ("sequence_classification", "regression", "multi_label", "question_answering", "token_classification")
CASES = [
    *((family, task) for family in ENCODERS for task in (*TEXT, "masked_lm")),
    *((family, task) for family in DECODERS for task in ("sequence_classification", "causal_lm")),
    ("gpt2", "question_answering"),
    ("qwen3", "question_answering"),
    *((family, "image_classification") for family in VISION),
]


def make_records(family: str, task: str | None = None, count: int = COUNT) -> list[dict[str, Any]]:
    """Records of different lengths, as lists, the way a tokenizer gives them."""
    batch = tiny_batch(family, task, batch=count, padding=None if family in VISION else "right")
    kept = batch.get("attention_mask", torch.ones(count, 1)).bool()
    rows = []
    for row in range(count):
        record = {"id": f"r{row}"}
        for name, values in batch.items():
            value = values[row]
            record[name] = (value[kept[row]] if values.shape == kept.shape else value).tolist()
        rows.append(record)
    return rows


@contextmanager
def hooked(model: nn.Module, heads: Tensor, filters: Tensor) -> Iterator[None]:
    """Gates heads [L, H] and filters [L, F] put in from outside, by hooks on the projections that they go into."""
    handles = []
    for index, layer in enumerate(find_layers(model)):
        head_gate = heads[index].repeat_interleave(layer.head_dim)
        for module, gate in ((layer.output, head_gate), (layer.ffn_out, filters[index])):
            handles.append(module.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate, *args[1:])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def loss_alone(model: nn.Module, task: str | None, batch: dict[str, Tensor]) -> Tensor:
    outputs = model(**batch)
    if task == "causal_lm":  # in fp64; the loss of transformers goes through fp32
        return F.cross_entropy(outputs.logits[0, :-1], batch["labels"][0, 1:])
    if task in ("masked_lm", "token_classification"):
        return F.cross_entropy(outputs.logits[0], batch["labels"][0])
    return outputs.loss


def loop(model: nn.Module, task: str | None, records: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """One sample, one forward, one backward at a time."""
    collate, shape = PaddingCollator(), layout(model)
    found = []
    for record in records:
        heads = torch.ones(shape.layers, shape.heads, dtype=torch.float64, requires_grad=True)
        filters = torch.ones(shape.layers, shape.filters, dtype=torch.float64, requires_grad=True)
        batch = collate([{name: value for name, value in record.items() if name != "id"}])
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        with hooked(model, heads, filters):
            found.append(torch.autograd.grad(loss_alone(model, task, batch), (heads, filters)))
    return torch.stack([h for h, _ in found]), torch.stack([f for _, f in found])


def pad_left(family: str) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Left padding, as tokenizers of language models have it."""

    def collate(records: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(record["input_ids"]) for record in records)
        turned = [{k: v[::-1] if isinstance(v, list) else v for k, v in record.items()} for record in records]
        batch = {k: v.flip(1) if v.shape[1:] == (width,) else v for k, v in PaddingCollator()(turned).items()}
        mask = batch["attention_mask"]
        for name in ("start_positions", "end_positions"):
            if name in batch:
                batch[name] = batch[name] + (1 - mask).sum(1)
        return batch

    return collate


def close(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-10 of the largest entry."""
    assert actual.shape == expected.shape
    assert expected.abs().max() > 1e-6
    assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("family, task", CASES)
def test_equals_one_autograd_pass_per_sample(family: str, task: str) -> None:
    model, records = tiny_model(family, task, dtype=torch.float64), make_records(family, task)
    heads, filters = loop(model, task, records)
    for batch_size, bucket in ((1, True), (2, True), (COUNT, False)):
        result = importance(model, records, batch_size=batch_size, bucket=bucket, dtype=torch.float64)
        close(result.heads, heads)
        close(result.filters, filters)
    assert result.ids == [f"r{row}" for row in range(COUNT)]
    assert torch.equal(result.grad_heads, result.heads.mean(0))
    torch.testing.assert_close(result.fisher_filters, result.filters.square().mean(0))


@pytest.mark.parametrize(
    "family, task",
    [
        *((family, "causal_lm") for family in DECODERS),
        *((family, task) for family in ENCODERS for task in ("question_answering", "masked_lm")),
        ("gpt2", "sequence_classification"),
        ("llama", "token_classification"),
    ],
)
def test_left_padding_changes_nothing(family: str, task: str) -> None:
    model, records = tiny_model(family, task, dtype=torch.float64), make_records(family, task)
    heads, filters = loop(model, task, records)
    result = importance(model, records, bucket=False, collate_fn=pad_left(family), dtype=torch.float64)
    close(result.heads, heads)
    close(result.filters, filters)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@on_a_gpu
def test_on_a_gpu_and_back() -> None:
    model, records = tiny_model("llama"), make_records("llama")
    expected = importance(model, records)
    result = importance(model, records, device="cuda", batch_size=2)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    torch.testing.assert_close(result.heads, expected.heads, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(result.filters, expected.filters, rtol=1e-3, atol=1e-4)


def weighted(outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return outputs.logits.sum(1) * inputs["weight"]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)], ids=["cpu", "gpu"])
def test_a_record_of_any_batch_that_is_not_finite_is_named(device: str, batch_size: int) -> None:
    for name in (f"r{row}" for row in range(COUNT)):
        records = make_records("bert")
        records = [{**record, "weight": torch.nan if record["id"] == name else 1.0} for record in records]
        message = rf"loss must be finite, got NaN or infinite values for ids \['{name}'\]"
        with pytest.raises(ValueError, match=message):
            importance(tiny_model("bert"), records, device=device, batch_size=batch_size, loss=weighted)


@pytest.mark.parametrize("batch_size", [1, 2, COUNT])
def test_a_batch_is_taken_care_of_once_the_next_one_is_started(
    monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    events: list[str] = []
    call, wait = GradientPass.__call__, BatchScores.wait
    monkeypatch.setattr(GradientPass, "__call__", lambda *given: events.append("start") or call(*given))
    monkeypatch.setattr(BatchScores, "wait", lambda scores: events.append("wait") or wait(scores))
    importance(tiny_model("bert"), make_records("bert"), batch_size=batch_size)
    batches = -(-COUNT // batch_size)
    assert events == ["start", *["start", "wait"] * (batches - 1), "wait"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_fp32_in_every_backend(backend: str) -> None:
    model, records = tiny_model("llama"), make_records("llama")
    result = importance(model, records, backend=backend)
    heads, filters = loop(model.double(), "causal_lm", records)
    torch.testing.assert_close(result.heads.double(), heads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.filters.double(), filters, rtol=1e-4, atol=1e-6)


def test_heads_are_query_heads_under_grouped_query_attention() -> None:
    model = tiny_model(GROUPED[0])
    assert layout(model).kv_heads < layout(model).heads
    assert importance(model, make_records(GROUPED[0])).heads.shape == (COUNT, 2, HEADS)


def graph_leaves(outputs: Tensor) -> set[int]:
    found, seen, nodes = set(), set(), [outputs.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen2", "vit"])
def test_no_gradient_of_weights_and_the_model_is_left_as_it_was(family: str) -> None:
    model, records = tiny_model(family, dropout=0.1), make_records(family)
    model.train()
    some = next(module for module in model.modules() if not list(module.children()))
    some.eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    leaves: set[int] = set()

    def loss(outputs: Any, inputs: Any) -> Tensor:
        leaves.update(graph_leaves(outputs.logits))
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        return outputs.logits.flatten(1).square().mean(1)

    importance(model, records, loss=loss)
    assert len(leaves) == 4  # heads and filters of two layers
    assert leaves.isdisjoint(map(id, parameters))
    assert parameters[1].grad.eq(1).all()
    assert all(p.grad is None for p in parameters if p is not parameters[1])
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert model.training
    assert not some.training
    assert not is_instrumented(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_with_adapters() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "dense"], init_lora_weights=False)
    model, records = peft.get_peft_model(tiny_model("bert"), config).double().eval(), make_records("bert")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    heads, filters = loop(model, None, records)
    result = importance(model, records, dtype=torch.float64)
    close(result.heads, heads)
    close(result.filters, filters)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_frozen_model_and_no_grad_are_no_hindrance(mode: Callable[[], Any]) -> None:
    model, records = tiny_model("bert"), make_records("bert")
    expected = importance(model, records)
    model.requires_grad_(False)
    with mode():
        result = importance(model, records)
    assert torch.equal(result.heads, expected.heads)
    assert not any(p.requires_grad for p in model.parameters())


def test_an_instrumented_model_stays_so_and_keeps_its_gates() -> None:
    model, records = tiny_model("bert"), make_records("bert")
    expected = importance(model, records)
    batch = tiny_batch("bert", labels=False)
    instrument(model)
    set_gates(model, torch.zeros(2, HEADS), torch.ones(2, FILTERS))
    gated = model(**batch).logits
    result = importance(model, records)
    assert is_instrumented(model)
    torch.testing.assert_close(result.filters, expected.filters)
    assert torch.equal(model(**batch).logits, gated)


def test_the_model_is_restored_after_an_error() -> None:
    model, records = tiny_model("bert", dropout=0.1).train(), make_records("bert")
    with pytest.raises(RuntimeError, match="stop"):
        importance(model, records, loss=lambda outputs, inputs: (_ for _ in ()).throw(RuntimeError("stop")))
    assert model.training
    assert not is_instrumented(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_loss_of_ones_own() -> None:
    model, records = tiny_model("bert", dtype=torch.float64), make_records("bert")
    double = importance(
        model,
        [{**record, "weight": 2.0} for record in records],
        loss=lambda outputs, inputs: (
            inputs["weight"] * F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")
        ),
        dtype=torch.float64,
    )
    close(double.heads, 2 * importance(model, records, dtype=torch.float64).heads)
    base = tiny_model("bert", "base")
    assert len(importance(base, records, loss=lambda outputs, inputs: outputs.pooler_output.sum(1))) == COUNT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model, records = tiny_model("bert"), make_records("bert")
    exact, rough = importance(model, records), importance(model, records, autocast=dtype)
    assert not torch.equal(exact.filters, rough.filters)
    scale = exact.filters.abs().max()
    assert (rough.filters - exact.filters).abs().max() < 0.05 * scale
    assert rough.provenance["autocast"] == str(dtype).removeprefix("torch.")


def test_a_half_precision_model_and_bf16_storage() -> None:
    model, records = tiny_model("llama"), make_records("llama")
    exact = importance(model, records)
    stored = importance(model, records, dtype=torch.bfloat16)
    assert torch.equal(stored.filters, exact.filters.bfloat16())
    half = importance(model.bfloat16(), records)
    assert half.filters.dtype == torch.float32
    assert not torch.equal(
        half.filters, half.filters.bfloat16().float()
    )  # summed in fp32, not rounded to the model's bf16
    assert (half.filters - exact.filters).abs().max() < 0.1 * exact.filters.abs().max()


def test_data_loaders_are_reordered_but_results_are_not() -> None:
    model, records = tiny_model("bert", dtype=torch.float64), make_records("bert")
    expected = importance(model, records, dtype=torch.float64)
    collate = PaddingCollator()
    sampler = [[4, 0], [1, 3, 2]]
    before = torch.get_rng_state()
    for loader in (
        DataLoader(records, batch_size=2, shuffle=True, collate_fn=lambda batch: collate(batch)),
        DataLoader(records, batch_sampler=sampler, collate_fn=collate),
        DataLoader(records, batch_size=None, collate_fn=collate),
    ):
        result = importance(model, loader, dtype=torch.float64)
        assert result.ids == expected.ids
        close(result.filters, expected.filters)
    part = importance(model, DataLoader(records, sampler=[3, 1], batch_size=2, collate_fn=collate), dtype=torch.float64)
    assert part.ids == ["r1", "r3"]
    close(part.heads, expected.heads[[1, 3]])
    assert torch.equal(torch.get_rng_state(), before)
    assert importance(model, Subset(records, [2, 4])).ids == ["r2", "r4"]


def test_a_dataset_of_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    model, records = tiny_model("bert", dtype=torch.float64), make_records("bert")
    data = datasets.Dataset.from_list([{**record, "text": "words"} for record in records])
    expected = importance(model, records, dtype=torch.float64)
    close(importance(model, data, dtype=torch.float64).heads, expected.heads)


def test_columns_that_the_model_does_not_take_are_left_out() -> None:
    """Whatever their shapes, and also where the model's forward would pass them on to its layers."""
    model, records = tiny_model("bert", dtype=torch.float64), make_records("bert")
    more = [
        {**record, "offset_mapping": [[0, 1]] * len(record["input_ids"]), "words": [0] * row, "dropout": 0.5}
        for row, record in enumerate(records)
    ]
    close(importance(model, more, dtype=torch.float64).heads, importance(model, records, dtype=torch.float64).heads)
    expected, found = record_scores(model, records), record_scores(model, more)
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    with pytest.raises(ValueError, match=r"(words|offset_mapping) must"):  # a loss may want any column
        importance(model, more, loss=lambda outputs, batch: outputs.logits.sum(1))


@pytest.mark.parametrize("token", [None, -1, 0, 3])
def test_a_padding_token_is_one(token: int | None) -> None:
    model = tiny_model("bert")
    model.config.pad_token_id = token
    assert padding_token(model) == (token if token == 3 else 0)


def test_ids_come_from_the_argument_the_records_or_their_places() -> None:
    model, records = tiny_model("bert"), make_records("bert")
    assert importance(model, records, ids=[7, 8, 9, 10, 11]).ids == ["7", "8", "9", "10", "11"]
    bare = [{k: v for k, v in record.items() if k != "id"} for record in records]
    assert importance(model, bare).ids == ["0", "1", "2", "3", "4"]


def test_buckets_hold_every_record_once_longest_first() -> None:
    lengths = [3, 9, 1, 9, 4, 3, 7]
    batches = list(LengthBucketSampler(lengths, 3))
    assert batches == [[1, 3, 6], [4, 0, 5], [2]]
    records = [{"input_ids": list(range(length)), "label": 0} for length in lengths]
    stream = RecordBatches(records, batch_size=3)
    assert len(stream) == 3
    seen = [(rows.tolist(), batch["input_ids"].shape) for rows, _, batch in stream]
    assert seen == [([1, 3, 6], (3, 9)), ([4, 0, 5], (3, 4)), ([2], (1, 1))]
    in_order = [rows.tolist() for rows, _, _ in RecordBatches(records, batch_size=3, bucket=False)]
    assert in_order == [[0, 1, 2], [3, 4, 5], [6]]


def test_padding_of_every_kind_of_column() -> None:
    records = [
        {"input_ids": [5, 6, 7], "label": 1, "token_type_ids": [1, 1, 1], "text": "a", "several": [0.5, 0.5]},
        {"input_ids": torch.tensor([8]), "label": 0, "token_type_ids": [1], "text": "b", "several": [1.0, 0.0]},
    ]
    batch = PaddingCollator(pad_token_id=9)(records)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["several"].tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert "text" not in batch
    labels = PaddingCollator()([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1], "labels": [1]}])["labels"]
    assert labels.tolist() == [[1, 2], [1, -100]]


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": []}, "data must hold at least one record"),
        ({"data": Endless()}, "data must be a map-style data set with a length, got Endless"),
        ({"data": [(1, 2)]}, "data must give dicts as records, got tuple"),
        ({"ids": ["a"] * COUNT}, "ids must be unique, got ['a', 'a', 'a', 'a'] more than once"),
        ({"ids": ["a"]}, "ids must name the 5 records of data, got 1 ids"),
        ({"dtype": torch.float16}, "dtype must be torch.float32, torch.bfloat16 or torch.float64, got torch.float16"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"loss": lambda outputs, inputs: outputs.logits.sum()}, "one loss per sample, shape (5,), got ()"),
        ({"loss": lambda outputs, inputs: torch.zeros(COUNT)}, "loss must depend on the model's outputs"),
        ({"loss": lambda outputs, inputs: outputs.logits.sum(1) * torch.tensor([1, 1, torch.nan, 1, 1])},
         "loss must be finite, got NaN or infinite values for ids ['r2']"),
        ({"model": nn.Linear(2, 2)}, "model must be a Hugging Face model"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"model": tiny_model("bert"), "data": make_records("bert"), "bucket": False} | change
    model, data = arguments.pop("model"), arguments.pop("data")
    with pytest.raises(ValueError) as error:
        importance(model, data, **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_records_are_named() -> None:
    model, records = tiny_model("bert"), make_records("bert")
    wrong = [*records[:3], {**records[3], "labels": 7}, records[4]]
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 7 for id 'r3'"):
        importance(model, wrong)
    with pytest.raises(ValueError, match=r"ids must be unique, got \['r0'\] more than once"):
        importance(model, [*records, records[0]])
    with pytest.raises(ValueError, match="data must give every record once, got 1 repetitions"):
        importance(model, DataLoader(records, sampler=[0, 1, 1]))
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="loss must be finite, got NaN or infinite values for ids"):
        importance(model, records)
    assert not is_instrumented(model)


def test_progress_is_silent_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model, records = tiny_model("bert"), make_records("bert")
    importance(model, records)
    importance(model, records, progress=False)
    assert capsys.readouterr().err == ""
    importance(model, records, progress=True)
    assert "5/5" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured() -> Importance:
    return importance(tiny_model("bert"), make_records("bert"))


def test_select_without_and_concat(measured: Importance) -> None:
    part = measured.select(["r3", "r1"])
    assert part.ids == ["r3", "r1"]
    assert torch.equal(part.heads, measured.heads[[3, 1]])
    rest = measured.without(["r3", "r1"])
    assert rest.ids == ["r0", "r2", "r4"]
    whole = Importance.concat([part, rest])
    assert torch.equal(whole.select(measured.ids).filters, measured.filters)
    assert whole.fingerprint != measured.fingerprint == whole.select(measured.ids).fingerprint
    torch.testing.assert_close(whole.fisher_heads, measured.fisher_heads)
    for call, message in (
        (lambda: measured.select(["r9"]), r"ids must be among the 5 records, got \['r9'\]"),
        (lambda: measured.without(["r9"]), r"ids must be among the 5 records, got \['r9'\]"),
        (lambda: measured.without("r3"), "ids must be a list, got the single str 'r3'"),
        (lambda: measured.select("r3"), "ids must be a list, got the single str 'r3'"),
        (lambda: measured.select(["r1", "r1"]), r"ids must be unique, got \['r1'\]"),
        (lambda: Importance.concat([part, part]), "ids must be unique"),
        (lambda: Importance.concat([]), "at least one Importance"),
        (lambda: measured.without(measured.ids).fisher_heads, "at least one record, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(measured: Importance, tmp_path: Any, mmap: bool, dtype: torch.dtype) -> None:
    path = tmp_path / "new" / "forget.safetensors"
    stored = Importance(
        measured.heads.to(dtype), measured.filters.to(dtype), measured.ids, measured.layout, measured.provenance
    )
    stored.save(path)
    loaded = Importance.load(path, tiny_model("bert"), mmap=mmap)
    assert torch.equal(loaded.heads, stored.heads)
    assert torch.equal(loaded.filters, stored.filters)
    assert (loaded.ids, loaded.layout, loaded.provenance) == (stored.ids, stored.layout, stored.provenance)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_files_that_are_not_importance(measured: Importance, tmp_path: Any) -> None:
    path = tmp_path / "forget.safetensors"
    measured.save(path)
    with pytest.raises(ValueError, match=r"importance must be of one model, got bert .* and roberta"):
        Importance.load(path, tiny_model("roberta"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="path must be an intact importance file"):
        Importance.load(path)
    with pytest.raises(FileNotFoundError):
        Importance.load(tmp_path / "absent.safetensors")


def test_a_mapped_file_is_not_read_until_it_is_used(tmp_path: Any) -> None:
    pytest.importorskip("psutil")
    shape, count = replace(layout(tiny_model("bert")), filters=4000), 1000
    names = [str(row) for row in range(count)]
    big = Importance(torch.zeros(count, 2, HEADS), torch.ones(count, 2, 4000), names, shape)
    path = tmp_path / "big.safetensors"
    big.save(path)
    # In processes of their own: memory that this one has freed would take the copy without growing.
    code = (
        "import sys, psutil; from pymape.importance import Importance; before = psutil.Process().memory_info().rss; "
        "found = Importance.load(sys.argv[1], mmap=sys.argv[2] == 'True'); assert found.filters[-1].sum() == 8000; "
        "print(psutil.Process().memory_info().rss - before)"
    )
    grown = [int(subprocess.check_output([sys.executable, "-c", code, path, str(mmap)])) for mmap in (True, False)]
    assert grown[1] - grown[0] > 25e6  # the filters take 32 MB
    assert torch.equal(Importance.load(path, mmap=False).filters, big.filters)


def test_the_shapes_are_checked(measured: Importance) -> None:
    with pytest.raises(ValueError, match=r"heads must have shape \(5, 2, 4\), got \(4, 2, 4\)"):
        Importance(measured.heads[1:], measured.filters, measured.ids, measured.layout)
