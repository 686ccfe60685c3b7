"""PrefixCache and FrozenPrefix: the same results as without them, whatever happens to the files."""

from __future__ import annotations

import copy
import errno
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import DECODERS, ENCODERS, FAMILIES, MORE_FAMILIES, tiny_batch, tiny_model
from torch import Tensor, nn
from trainer_tools import arguments as trainer_arguments
from transformers import TrainingArguments

from pymape.data.batching import PaddingCollator
from pymape.frozen_prefix import FrozenPrefix
from pymape.masks import ModuleMasks
from pymape.model_layout import find_layers, layout
from pymape.modules import gates, instrument
from pymape.partial import PartialParameters
from pymape.prefix_cache import PrefixCache
from pymape.trainer import UnlearnTrainer

LAYERS = 3


def deep_model(family: str, **options) -> nn.Module:
    """Three layers, so that a prefix of two leaves one out and one in.

    32 filters, so that every token's lie in whole vector registers: of 25, torch computes some by scalar code, which
    ones depends on the row of the batch, and its SiLU then rounds differently.
    """
    depth, width = {"distilbert": ("n_layers", "hidden_dim"), "gpt2": ("n_layer", "n_inner")}.get(
        family, ("num_hidden_layers", "intermediate_size")
    )
    model = tiny_model(family, **({depth: LAYERS, width: 32} | options))
    model.requires_grad_(False)
    return model


def upper_masks(model: nn.Module, lowest: int) -> ModuleMasks:
    shape = layout(model)
    masks = ModuleMasks.everything(shape)
    masks.heads[:lowest], masks.filters[:lowest] = False, False
    masks.heads[:, shape.group_size :] = False
    masks.filters[:, ::2] = False
    return masks


def ids(count: int, start: int = 0) -> list[str]:
    return [f"record {row}" for row in range(start, start + count)]


def prefix_of(model: nn.Module, path: Path, layers: int = 2, **options) -> FrozenPrefix:
    return FrozenPrefix(model, layers, PrefixCache(path, **options))


def files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


def rows(batch: dict[str, Tensor], index: list[int]) -> dict[str, Tensor]:
    return {name: value[index] for name, value in batch.items()}


@pytest.mark.parametrize(
    "family, layers",
    [*((family, layers) for family in FAMILIES for layers in (1, 2, 3)), *((family, 2) for family in MORE_FAMILIES)],
)
def test_same_bits_as_without(family: str, layers: int, tmp_path: Path) -> None:
    model, batch = deep_model(family), tiny_batch(family, batch=5)
    prefix = prefix_of(model, tmp_path, layers)
    expected = model(**batch)
    for _ in range(2):
        outputs = prefix.run(ids(5), batch)
        assert torch.equal(outputs.logits, expected.logits)
        assert torch.equal(outputs.loss, expected.loss)
    assert (prefix.cache.hits, prefix.cache.misses) == (5, 5)
    order = [4, 0, 2]
    mixed = prefix.run([ids(5)[row] for row in order], rows(batch, order))
    assert torch.equal(mixed.logits, model(**rows(batch, order)).logits)
    assert not any("forward" in vars(layer.layer) for layer in find_layers(model))


def test_positions_that_depend_on_the_batch_are_refused(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, **factors}
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=8)
    with pytest.raises(ValueError, match="no other record changes for a prefix cache, got 'longrope'"):
        prefix_of(model, tmp_path, 1)
    mixed = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=mixed)
    with pytest.raises(ValueError, match="got 'dynamic'"):
        prefix_of(model, tmp_path, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_below_do_not_run_for_known_records(family: str, tmp_path: Path) -> None:
    model, batch = deep_model(family), tiny_batch(family)
    prefix = prefix_of(model, tmp_path)
    prefix.run(ids(3), batch)
    calls = []
    for number, layer in enumerate(find_layers(model)):
        layer.output.register_forward_hook(lambda *_, number=number: calls.append(number))
    prefix.run(ids(3), batch)
    assert calls == [2]
    calls.clear()
    fresh = prefix_of(model, tmp_path)  # another process: it runs one record to learn what layers return
    fresh.run(ids(3), batch)
    fresh.run(ids(3), batch)
    assert calls == [0, 1, 2, 2]


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_of_any_amount(family: str, padding: str, tmp_path: Path) -> None:
    model = deep_model(family, dtype=torch.float64)
    batch = tiny_batch(family, batch=4, padding=padding)
    prefix = prefix_of(model, tmp_path)
    torch.testing.assert_close(prefix.run(ids(4), batch).loss, model(**batch).loss)
    shorter = rows(batch, [3])  # the shortest record, in a batch of its own without padding
    valid = shorter["attention_mask"][0].bool()
    shorter = {name: value[:, valid] if value.dim() == 2 else value for name, value in shorter.items()}
    outputs, expected = prefix.run(ids(1, 3), shorter), model(**shorter)
    torch.testing.assert_close(outputs.logits, expected.logits)
    # From the right, the record's tokens keep their places, and its states serve again.
    assert prefix.cache.hits == (1 if padding == "right" else 0)
    torch.testing.assert_close(prefix.run(ids(4), batch).loss, model(**batch).loss)


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_training_with_and_without_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    batches = [tiny_batch(family, batch=2, seed=seed) for seed in range(3)]
    results = []
    for cached in (False, True):
        model = deep_model(family, dropout=0.3)
        partial = PartialParameters(model, upper_masks(model, 2))
        prefix = prefix_of(model, tmp_path)
        optimizer = torch.optim.AdamW(partial.parameters(), lr=1e-2)
        partial.attach(optimizer)
        torch.manual_seed(0)
        for _ in range(2):
            for number, batch in enumerate(batches):
                model.train()
                outputs = prefix.run(ids(2, 2 * number), batch) if cached else model(**batch)
                optimizer.zero_grad()
                outputs.loss.backward()
                optimizer.step()
        assert prefix.cache.hits == (6 if cached else 0)
        results.append(partial.merge().state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_torch_compile(family: str, tmp_path: Path) -> None:
    model = deep_model(family)
    partial = PartialParameters(model, upper_masks(model, 2))
    prefix = prefix_of(model, tmp_path)
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (0, 0, 1, 1, 0):
        batch = tiny_batch(family, seed=seed)
        plain = torch.autograd.grad(model(**batch).loss, list(partial.parameters()))
        loss = prefix.run(ids(3, 3 * seed), batch, compiled).loss
        for one, other in zip(plain, torch.autograd.grad(loss, list(partial.parameters())), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_autocast_has_states_of_its_own(tmp_path: Path) -> None:
    model, batch = deep_model("bert"), tiny_batch("bert")
    prefix = prefix_of(model, tmp_path)
    prefix.run(ids(3), batch)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits
        assert torch.equal(prefix.run(ids(3), batch).logits, expected)
        assert torch.equal(prefix.run(ids(3), batch).logits, expected)
    assert prefix.cache.misses == 6


def test_other_weights_or_configuration_have_states_of_their_own(tmp_path: Path) -> None:
    model, batch = deep_model("bert"), tiny_batch("bert")
    prefix = prefix_of(model, tmp_path)
    prefix.run(ids(3), batch)
    layers = find_layers(model)
    layers[2].ffn_in.weight.mul_(2)  # above the prefix
    prefix.run(ids(3), batch)
    assert prefix.cache.hits == 3
    layers[1].ffn_in.weight.mul_(2)
    assert torch.equal(prefix.run(ids(3), batch).logits, model(**batch).logits)
    assert prefix.cache.hits == 3
    other = deep_model("bert", layer_norm_eps=0.1)
    assert torch.equal(prefix_of(other, tmp_path).run(ids(3), batch).logits, other(**batch).logits)
    assert prefix_of(other, tmp_path, layers=1).states(ids(3), batch).shape == (3, 7, 16)


def test_what_random_inputs_and_dropout_do(tmp_path: Path) -> None:
    model, batch = deep_model("vit", dropout=0.1), tiny_batch("vit")
    prefix = prefix_of(model, tmp_path)
    prefix.run(ids(3), batch)
    with pytest.raises(ValueError, match="inputs of record 'record 1' must stay the same, got others than before"):
        prefix.run(ids(1, 1), rows(batch, [2]))
    changed = prefix_of(model, tmp_path)  # a later run on other data: not served from what is stored
    assert torch.equal(changed.run(ids(1, 1), rows(batch, [2])).logits, model(**rows(batch, [2])).logits)
    model.train()
    with pytest.raises(
        ValueError, match="prefix must be in eval mode, where no dropout acts, got ViTEmbeddings in train"
    ):
        prefix.run(ids(3), batch)


def test_what_is_refused(tmp_path: Path) -> None:
    model, batch = deep_model("bert"), tiny_batch("bert")
    prefix = prefix_of(model, tmp_path)
    with pytest.raises(ValueError, match=r"layers must lie in \[1, 3\], got 4"):
        prefix_of(model, tmp_path, layers=4)
    with pytest.raises(ValueError, match="records must hold one id for each of 3 rows, got 2"):
        prefix.run(ids(2), batch)
    with pytest.raises(ValueError, match="max_bytes must be at least 0"):
        PrefixCache(tmp_path, max_bytes=-1)
    find_layers(model)[0].ffn_in.requires_grad_(True)
    with pytest.raises(ValueError, match="prefix must be frozen, got parameters of BertLayer"):
        prefix.run(ids(3), batch)
    model.requires_grad_(False)
    instrument(model)
    prefix.run(ids(3), batch)
    with gates(model, heads=torch.full((LAYERS, 4), 0.5)), pytest.raises(ValueError, match="must have no gates"):
        prefix.run(ids(3), batch)


def test_a_call_for_all_layers_runs_as_it_is(tmp_path: Path) -> None:
    model, batch = deep_model("llama"), tiny_batch("llama")
    prefix = prefix_of(model, tmp_path)
    prefix.run(ids(3), batch)
    expected = model(**batch, output_hidden_states=True).hidden_states
    states = prefix.run(ids(3), {**batch, "output_hidden_states": True}).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(states, expected, strict=True))
    cache = prefix.run(ids(3), {**batch, "use_cache": True}).past_key_values
    assert cache.get_seq_length(0) == 7
    assert prefix.run(ids(3), batch).past_key_values is None


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "flip header", "text", "other record"])
def test_damaged_files_are_noticed_and_replaced(damage: str, tmp_path: Path) -> None:
    model, batch = deep_model("bert"), tiny_batch("bert")
    expected = model(**batch).logits
    prefix_of(model, tmp_path).run(ids(3), batch)
    first, second, _ = stored = sorted(files(tmp_path))
    content = bytearray(first.read_bytes())
    if damage == "truncate":
        content = content[:-7]
    elif damage == "empty":
        content = bytearray()
    elif damage == "text":
        content = bytearray(b"no tensors here")
    elif damage == "other record":
        content = bytearray(second.read_bytes())
    else:
        content[-9 if damage == "flip" else content.index(b"checksum") + 14] ^= 1
    first.write_bytes(content)
    prefix = prefix_of(model, tmp_path)
    assert torch.equal(prefix.run(ids(3), batch).logits, expected)
    assert (prefix.cache.damaged, prefix.cache.hits) == (1, 2)
    again = prefix_of(model, tmp_path)
    assert torch.equal(again.run(ids(3), batch).logits, expected)
    assert (again.cache.damaged, again.cache.hits) == (0, 3)
    assert sorted(files(tmp_path)) == stored


def test_deleted_at_any_time(tmp_path: Path) -> None:
    model, batch = deep_model("bert"), tiny_batch("bert")
    expected = model(**batch).logits
    folder = tmp_path / "cache"
    prefix = prefix_of(model, folder)
    for _ in range(2):
        assert torch.equal(prefix.run(ids(3), batch).logits, expected)
        files(folder)[0].unlink()
        assert torch.equal(prefix.run(ids(3), batch).logits, expected)
        shutil.rmtree(folder)
    prefix.run(ids(3), batch)
    assert len(prefix.cache) == 3
    prefix.cache.clear()
    assert not files(folder)
    assert len(prefix.cache) == prefix.cache.nbytes == 0


def test_size_limit(tmp_path: Path) -> None:
    model, batch = deep_model("bert"), tiny_batch("bert", batch=6)
    one = 7 * 16 * 4
    prefix = prefix_of(model, tmp_path, max_bytes=4 * one + 3000)
    for _ in range(2):
        assert torch.equal(prefix.run(ids(6), batch).logits, model(**batch).logits)
    stored = len(prefix.cache)
    assert 0 < stored < 6
    assert prefix.cache.hits == stored
    assert sum(file.stat().st_size for file in files(tmp_path)) == prefix.cache.nbytes <= 4 * one + 3000
    full, free = (PrefixCache(tmp_path, max_bytes=prefix.cache.nbytes + more) for more in (1000, 1100))
    assert not full.put("other", "r9", "", torch.ones(4))  # what others have stored counts
    assert free.put("other", "r9", "", torch.ones(4))
    assert not free.put("other", "r10", "", torch.ones(4))
    nothing = prefix_of(model, tmp_path / "nothing", max_bytes=0)
    nothing.run(ids(6), batch)
    assert not files(tmp_path / "nothing")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_costs_the_cache_only(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        """Takes half of what it is given; a second name of the file shows what became of that."""

        def write(self, content: Any) -> int:
            super().write(content[: len(content) // 2])
            (partial,) = folder.rglob("*.tmp")
            (tmp_path / "second name").unlink(missing_ok=True)
            (tmp_path / "second name").hardlink_to(partial)
            raise OSError(code, os.strerror(code))

    model, batch, folder = deep_model("bert"), tiny_batch("bert"), tmp_path / "cache"
    prefix = prefix_of(model, folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", lambda handle, mode: Full(handle, mode))
        if code == errno.EIO:
            with pytest.raises(OSError, match=os.strerror(code)):
                prefix.run(ids(3), batch)
        else:
            assert torch.equal(prefix.run(ids(3), batch).logits, model(**batch).logits)
            assert not prefix.cache.put("other", "r", "", torch.ones(4))
    assert not files(folder)
    assert not (tmp_path / "second name").read_bytes().strip(b"\0")
    assert prefix.cache.nbytes == 0
    prefix.run(ids(3), batch)
    assert len(prefix.cache) == 3


def test_erase_leaves_no_bytes_of_a_record(tmp_path: Path) -> None:
    model, batch = deep_model("bert"), tiny_batch("bert")
    states = {}
    for layers in (1, 2):  # two uses of one folder
        states[layers] = prefix_of(model, tmp_path, layers).states(ids(3), batch)
    for file in files(tmp_path):
        shutil.copy(file, file.with_suffix(".abc.tmp"))  # what a process killed while writing leaves
    cache = PrefixCache(tmp_path)
    assert len(cache) == 6
    for number, file in enumerate(files(tmp_path)):
        (tmp_path / str(number)).hardlink_to(file)  # a second name of every file shows what became of its bytes
    assert cache.holding([*ids(3), "never stored"]) == ids(3)
    assert cache.erase(ids(2)) == 8
    assert cache.holding(ids(3)) == ids(3)[2:]
    assert cache.erase([*ids(2), "never stored"]) == 0
    for kept in states.values():
        for row, gone in enumerate((True, True, False)):
            found = [file for file in files(tmp_path) if kept[row].numpy().tobytes() in file.read_bytes()]
            assert bool(found) != gone
    assert len(cache) == 2
    assert cache.nbytes == sum(f.stat().st_size for f in tmp_path.glob("*/*"))


@pytest.mark.parametrize("links", [True, False])
def test_what_is_replaced_is_overwritten(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second name of a file shows what became of its bytes; not all file systems have such names."""
    cache, second = PrefixCache(tmp_path / "cache"), tmp_path / "second name"
    assert cache.put("prefix", "r", "inputs", torch.ones(4))
    [file] = files(tmp_path / "cache")
    second.hardlink_to(file)
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    before, size = second.read_bytes(), file.stat().st_size
    assert cache.put("prefix", "r", "inputs", torch.ones(4))
    assert file.samefile(second)  # the same content is not written again
    assert cache.put("prefix", "r", "others", torch.full((4,), 2.0))
    assert second.read_bytes() == bytes(len(before))
    assert files(tmp_path / "cache") == [file]
    assert cache.get("prefix", "r", "inputs") is None
    assert torch.equal(cache.get("prefix", "r", "others"), torch.full((4,), 2.0))
    assert cache.nbytes == file.stat().st_size == size


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_two_writers_of_one_record_leave_one_file(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is done while this one writes."""
    cache, other, make = PrefixCache(tmp_path / "cache"), PrefixCache(tmp_path / "cache"), tempfile.mkstemp
    written = []

    def late(**options: Any) -> tuple[int, str]:
        if not written:
            written.append(tmp_path / "first")
            assert other.put("prefix", "r", "inputs", torch.full((4,), value))
            written[0].hardlink_to(*files(tmp_path / "cache"))
        handle, name = make(**options)
        written.append(tmp_path / f"link {len(written)}")
        written[-1].hardlink_to(name)
        return handle, name

    monkeypatch.setattr(tempfile, "mkstemp", late)
    assert cache.put("prefix", "r", "inputs", torch.ones(4))
    [file] = files(tmp_path / "cache")
    assert torch.equal(cache.get("prefix", "r", "inputs"), torch.ones(4))
    assert len(written) == 3
    for link in written:
        assert link.samefile(file) or not link.read_bytes().strip(b"\0")
    assert any(link.samefile(file) for link in written)
    assert cache.nbytes == file.stat().st_size


def test_states_that_were_read_survive_their_file(tmp_path: Path) -> None:
    cache = PrefixCache(tmp_path)
    cache.put("prefix", "r", "inputs", torch.ones(4))
    states = cache.get("prefix", "r", "inputs")
    cache.erase(["r"])
    assert torch.equal(states, torch.ones(4))


def test_several_models_and_copies_share_a_folder(tmp_path: Path) -> None:
    model, batch = deep_model("gpt2"), tiny_batch("gpt2")
    other = copy.deepcopy(model)
    other.config.name_or_path = "elsewhere"
    prefix_of(model, tmp_path).run(ids(3), batch)
    twin = prefix_of(other, tmp_path)
    assert torch.equal(twin.run(ids(3), batch).logits, model(**batch).logits)
    assert twin.cache.hits == 3


def train(family: str, path: Path, cache: Path | PrefixCache | None, objective: str = "gd", masks=None, **options):
    """Two epochs of UnlearnTrainer with dropout, and the hits of its cache."""
    model = deep_model(family, dropout=0.1).requires_grad_(True)
    batch = tiny_batch(family, batch=12, seed=3)
    records = [{"id": f"{row}", **{name: value[row] for name, value in batch.items()}} for row in range(12)]
    arguments = TrainingArguments(
        str(path), report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, learning_rate=1e-2,
        per_device_train_batch_size=4, num_train_epochs=2, **options,
    )  # fmt: skip
    trainer = UnlearnTrainer(
        model,
        arguments,
        forget_dataset=records[:4],
        retain_dataset=records[4:],
        objective=objective,
        masks=masks or upper_masks(model, 2),
        prefix_cache=cache,
    )
    trainer.train()
    return trainer.merge().state_dict()


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])
def test_trainer_with_and_without_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    cache = PrefixCache(tmp_path / "cache")
    plain, cached = train(family, tmp_path, None), train(family, tmp_path, cache)
    assert (cache.misses, cache.hits, len(cache)) == (12, 4 * 8 - 12, 12)
    assert all(torch.equal(value, cached[name]) for name, value in plain.items())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_record_is_the_same_whatever_its_batch_pads(family: str, side: str, tmp_path: Path) -> None:
    """Without masks in the records, these and the positions that count are in some of the batches only."""
    texts = [torch.randint(3, 40, (length,)) for length in (3, 5, 5, 4, 6, 5)]

    def collate(records: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = PaddingCollator()(records)
        return {name: value.flip(1) if side == "left" and value.dim() == 2 else value for name, value in batch.items()}

    def trained(cache: Path | None) -> dict[str, Tensor]:
        model = deep_model(family).requires_grad_(True)
        labels = {"labels": 1} if family == "bert" else {}
        records = [
            {"id": f"{row}", "input_ids": text, **(labels or {"labels": text})} for row, text in enumerate(texts)
        ]
        options = {"per_device_train_batch_size": 2, "num_train_epochs": 6, "learning_rate": 1e-2, "optim": "sgd"}
        trainer = UnlearnTrainer(
            model,
            trainer_arguments(tmp_path, **options),
            forget_dataset=records[:3],
            retain_dataset=records[3:],
            masks=upper_masks(model, 2),
            prefix_cache=cache,
            data_collator=collate,
        )
        trainer.train()
        return trainer.merge().state_dict()

    plain, cached = trained(None), trained(tmp_path / "cache")
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["kl", "npo", "rl"])
def test_trainer_serves_every_objective(objective: str, tmp_path: Path) -> None:
    plain = train("llama", tmp_path, None, objective)
    cached = train("llama", tmp_path, tmp_path / "cache", objective)
    assert len(PrefixCache(tmp_path / "cache")) == 12
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value)


def test_trainer_under_autocast_and_checkpointing(tmp_path: Path) -> None:
    options = {"bf16": True, "gradient_checkpointing": True}
    plain = train("llama", tmp_path, None, **options)
    cached = train("llama", tmp_path, tmp_path / "cache", **options)
    assert all(torch.equal(value, cached[name]) for name, value in plain.items())


def test_trainer_refuses_masks_of_the_lowest_layer(tmp_path: Path) -> None:
    model = deep_model("bert")
    with pytest.raises(ValueError, match="prefix_cache needs masks that leave layer 0 alone, got lowest layer 0"):
        train("bert", tmp_path, tmp_path / "cache", masks=upper_masks(model, 0))
