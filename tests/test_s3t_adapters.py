"""SlicedAdapters: groups of LoRA that act exactly where they should, and are PEFT's."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import DECODERS, FAMILIES, tiny_batch, tiny_model
from peft import PeftModel, get_peft_model_state_dict
from s3t_tools import options, same_tensors, write_base
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pymape.model_layout import find_layers
from pymape.s3t.adapters import SlicedAdapters
from pymape.s3t.config import LoraConfig, S3TConfig
from pymape.s3t.frozen_base import base_hash, load_base


def questions(family: str) -> dict[str, Tensor]:
    return tiny_batch(family, labels=False, padding=None if family in ("vit", "deit") else "right")


def random_chain(adapters: SlicedAdapters, depth: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(depth)
    return [
        {name: torch.randn(value.shape, generator=generator) for name, value in adapters.stage_tensors(stage).items()}
        for stage in range(1, depth + 1)
    ]


def make(folder: Path, family: str = "bert", layers: int = 4, **changes: Any) -> tuple[SlicedAdapters, S3TConfig]:
    config = options(write_base(folder / "base", family, layers=layers), **changes)
    return SlicedAdapters(load_base(config.model), config), config


def layer_numbers(tensors: dict[str, Tensor]) -> set[int]:
    return {int(n) for name in tensors for n in re.findall(r"\.(\d+)\.", name) if ".lora_" in name}


@torch.no_grad()
def entering(model: Any, layer: int, inputs: dict[str, Tensor]) -> Tensor:
    """Hidden states that enter a layer."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    handle = find_layers(model)[layer].layer.register_forward_pre_hook(note, with_kwargs=True)
    model(**inputs)
    handle.remove()
    return found[0]


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> bytes:
    return model(**inputs).logits.numpy().tobytes()


@pytest.mark.parametrize("targets", ["qv", "attention", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_depth_acts_as_peft_does_on_its_export(family: str, targets: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, alpha=4.0, targets=targets, rslora=True)
    adapters, config = make(tmp_path, family, lora=lora, slices=2, layers_per_slice=1)
    inputs, plain = questions(family), load_base(config.model)
    chain = random_chain(adapters, 2)
    assert logits(adapters.base, inputs) == logits(plain, inputs)
    for depth in (2, 1, 2):
        adapters.load(chain[:depth])
        folder = tmp_path / f"export-{depth}"
        export = adapters.export_config(depth)
        export.save_pretrained(folder)
        merged = {name: value for stage in chain[:depth] for name, value in stage.items()}
        save_file(merged, folder / "adapter_model.safetensors")
        peft_model = PeftModel.from_pretrained(load_base(config.model), folder).eval()
        assert logits(peft_model, inputs) == logits(adapters.model, inputs) != logits(plain, inputs)
        # PEFT has the same tensors under the same names, and no others.
        assert same_tensors(get_peft_model_state_dict(peft_model), merged)
        assert same_tensors(get_peft_model_state_dict(adapters.model), merged)
    with pytest.raises(ValueError, match=r"depth must lie in \[1, 2\] to be exported, got 0"):
        adapters.export_config(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_below_are_the_base_bit_by_bit(family: str, tmp_path: Path) -> None:
    adapters, config = make(tmp_path, family)
    plain, inputs = load_base(config.model), questions(family)
    chain = random_chain(adapters, 4)
    for depth in (4, 3, 2, 1, 0, 3):
        adapters.load(chain)
        adapters.set_depth(depth)
        first = adapters.first_layer(depth)
        assert first == 4 - depth
        if depth:
            theirs, ours = entering(plain, first, inputs), entering(adapters.base, first, inputs)
            assert theirs.numpy().tobytes() == ours.numpy().tobytes()
        else:
            assert logits(plain, inputs) == logits(adapters.base, inputs)
        assert layer_numbers(dict(adapters.base.named_parameters())) == set(range(first, 4))


def head_names(tensors: dict[str, Tensor]) -> set[str]:
    return {name for name in tensors if ".lora_" not in name}


def test_a_group_that_is_off_keeps_even_the_sign_of_zero(tmp_path: Path) -> None:
    adapters, _ = make(tmp_path)
    name = "bert.encoder.layer.2.attention.self.query"
    inside = adapters.base.get_submodule(name)
    inside.register_forward_hook(lambda module, args, output: torch.full_like(output, -0.0))
    inputs = torch.randn(3, 16)
    adapters.load(random_chain(adapters, 1))
    assert torch.signbit(adapters.base.get_submodule(name)(inputs)).all()
    adapters.grow(torch.Generator())  # B = 0 adds a zero, which is not the same
    assert not torch.signbit(adapters.base.get_submodule(name)(inputs)).any()
    adapters.set_depth(1)
    assert torch.signbit(adapters.base.get_submodule(name)(inputs)).all()


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "gpt2"])
def test_layer_one_is_not_layer_ten(family: str, tmp_path: Path) -> None:
    # The public reference matches "layer.1" in "layer.10" and "layer.11".
    adapters, config = make(tmp_path, family, layers=12, slices=12)
    for stage in range(1, 13):
        assert adapters.group(stage) == [12 - stage]
        assert layer_numbers(adapters.stage_tensors(stage)) == {12 - stage}
        export = adapters.export_config(stage)
        assert sorted(export.layers_to_transform) == list(range(12 - stage, 12))
    adapters.load(random_chain(adapters, 2))
    folder = tmp_path / "export"
    adapters.export_config(2).save_pretrained(folder)
    save_file(get_peft_model_state_dict(adapters.model), folder / "adapter_model.safetensors")
    peft_model = PeftModel.from_pretrained(load_base(config.model), folder)
    assert layer_numbers(dict(peft_model.named_parameters())) == {10, 11}
    three, _ = make(tmp_path, family, layers=12, slices=3, layers_per_slice=2)
    assert [three.group(stage) for stage in (1, 2, 3)] == [[10, 11], [8, 9], [6, 7]]


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "llama", "gpt2"])
def test_stages_accumulate(family: str, tmp_path: Path) -> None:
    # The public reference wraps a loaded adapter anew, which wipes it.
    adapters, _ = make(tmp_path, family)
    chain = random_chain(adapters, 4)
    for depth in range(5):
        adapters.load(chain[:depth])
        for stage, tensors in enumerate(chain[:depth], start=1):
            own = adapters.stage_tensors(stage)
            assert all(torch.equal(own[name], tensors[name]) for name in own.keys() - head_names(own))
        head = chain[depth - 1] if depth else adapters._base_head
        assert all(torch.equal(adapters.stage_tensors(1)[name], head[name]) for name in head_names(chain[0]))
        if depth < 4:
            before = [adapters.stage_tensors(stage) for stage in range(1, depth + 1)]
            trained = adapters.grow(torch.Generator().manual_seed(1))
            adapters.freeze()
            after = [adapters.stage_tensors(stage) for stage in range(1, depth + 1)]
            assert all(same_tensors(one, other) for one, other in zip(before, after, strict=True))
            fresh = [value for name, value in trained.items() if ".lora_A." in name]
            assert all(value.std() > 0 for value in fresh)
            assert not any(value.any() for name, value in trained.items() if ".lora_B." in name)
    with pytest.raises(ValueError, match="chain must be shorter than 4 stages to grow, got 4"):
        adapters.grow(torch.Generator())
    assert not any("base_model.model.base_model" in name for name, _ in adapters.model.named_modules())


def test_a_stage_holds_its_group_and_a_head_of_its_own(tmp_path: Path) -> None:
    # The public reference saves all adapters with every slice.
    adapters, _ = make(tmp_path)
    chain = random_chain(adapters, 3)
    adapters.load(chain)
    names = [set(adapters.stage_tensors(stage)) for stage in range(1, 5)]
    head = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    for one in range(4):
        assert head < names[one]
        for other in range(one):
            assert names[one] & names[other] == head
    for depth in (1, 3, 2, 0):
        adapters.set_depth(depth)
        expected = chain[depth - 1] if depth else adapters._base_head
        assert all(torch.equal(adapters.stage_tensors(1)[name], expected[name]) for name in head)
    with pytest.raises(ValueError, match=r"depth must lie in \[0, 3\], the stages loaded, got 4"):
        adapters.set_depth(4)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_new_group_and_the_head_are_trained(family: str, tmp_path: Path) -> None:
    adapters, _ = make(tmp_path, family, lora=LoraConfig(r=2, dropout=0.5))
    adapters.load(random_chain(adapters, 1))
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())
    trained = adapters.grow(torch.Generator())
    asked = {id(parameter) for parameter in adapters.model.parameters() if parameter.requires_grad}
    assert asked == {id(parameter) for parameter in trained.values()}
    assert layer_numbers(dict(trained)) == {2}
    assert bool(head_names(dict(trained))) == (family not in DECODERS)
    training = {name for name, module in adapters.base.named_modules() if module.training}
    assert training
    assert all(".2." in name and ".lora_dropout" in name for name in training)
    # Nothing below the new group is in the graph.
    with torch.enable_grad():
        outputs: list[Tensor] = []
        layers = find_layers(adapters.base)
        for layer in (1, 2):
            layers[layer].layer.register_forward_hook(
                lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
            )
        adapters.base(**questions(family)).logits.sum().backward()
    assert [output.requires_grad for output in outputs] == [False, True]
    adapters.freeze()
    assert not any(module.training for module in adapters.base.modules())
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])
def test_the_hash_of_the_base(family: str, tmp_path: Path) -> None:
    adapters, config = make(tmp_path, family)
    plain = load_base(config.model)
    expected = base_hash(config.model)
    moved = shutil.copytree(config.model, tmp_path / "moved")
    assert base_hash(plain) == base_hash(moved) == expected
    for depth in range(5):
        adapters.load(random_chain(adapters, depth))
        assert adapters.base_hash() == expected
    others = {expected}
    for name, _ in plain.named_parameters():
        changed = copy.deepcopy(plain)
        bits = changed.get_parameter(name).data.view(torch.int32)
        bits.view(-1)[-1] ^= 1
        others.add(base_hash(changed))
    assert len(others) == 1 + len(list(plain.parameters()))
    write_base(
        tmp_path / "other", family, **({"layer_norm_epsilon": 0.1} if family == "gpt2" else {"hidden_act": "relu"})
    )
    assert base_hash(tmp_path / "other") not in others
    with torch.no_grad():
        find_layers(adapters.base)[3].ffn_out.weight[0, 0] += 1
    assert adapters.base_hash() != expected


def test_a_new_head_is_the_same_everywhere(tmp_path: Path) -> None:
    tiny_model("bert", "base").save_pretrained(tmp_path / "bare")
    write_base(tmp_path / "three", "vit")
    with pytest.raises(ValueError, match=r"model must have a task head, got BertModel in .*: set labels"):
        load_base(tmp_path / "bare")
    for folder, count in (("bare", 5), ("three", 7)):
        hashes = set()
        for seed in range(3):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            model = load_base(tmp_path / folder, count)
            assert torch.equal(torch.get_rng_state(), state)
            assert model.config.num_labels == count
            hashes.add(base_hash(model))
        assert hashes == {base_hash(tmp_path / folder, count)}
    assert base_hash(tmp_path / "three") == base_hash(tmp_path / "three", 3)  # it brings three classes of its own


def test_what_is_refused(tmp_path: Path) -> None:
    config = options(write_base(tmp_path / "base", layers=4))
    for size, slices, message in (
        (2, 4, r"layers_per_slice must lie in \[1, 1\] for 4 slices and 4 layers, got 2"),
        (0, 4, r"layers_per_slice must lie in \[1, 1\] for 4 slices and 4 layers, got 0"),
        (None, 5, "slices must be at most 4, the layers of the model, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            SlicedAdapters(load_base(config.model), options(config.model, layers_per_slice=size, slices=slices))
    model = load_base(config.model)
    model.bert.norm = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match=r"model must have no BatchNorm, .* got 'bert.norm'"):
        SlicedAdapters(model, config)
    with pytest.raises(ValueError, match=r"lora.targets must be one of qv, attention, all, got 'some'"):
        SlicedAdapters(load_base(config.model), options(config.model, lora=LoraConfig(targets="some")))
    questions = tiny_model("bert", "question_answering", num_hidden_layers=4)
    with pytest.raises(ValueError, match="model must give one tensor of logits, got a BertForQuestionAnswering"):
        SlicedAdapters(questions, config)
    for family in ("llama", "gpt2"):  # they read the last token before the padding
        with pytest.raises(ValueError, match=r"model must have a pad_token_id in its config.json, got"):
            SlicedAdapters(tiny_model(family, "sequence_classification", pad_token_id=None), options("", slices=2))
    from transformers import T5Config, T5ForConditionalGeneration

    with pytest.raises(ValueError, match="architecture 't5' is not supported"):
        SlicedAdapters(T5ForConditionalGeneration(T5Config(d_model=8, num_layers=2, vocab_size=9)), config)
    with pytest.raises(ValueError, match=r"model must be a Hugging Face model folder with a config.json, got"):
        load_base(tmp_path)
    weights = tmp_path / "base" / "model.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if "layer.1" not in name}, weights)
    for labels in (None, 5):
        with pytest.raises(ValueError, match=r"model must hold all weights of BertForSequence.* without .*layer.1"):
            load_base(config.model, labels)


def test_a_chain_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    adapters, _ = make(tmp_path)
    chain = random_chain(adapters, 2)
    adapters.load(chain)
    before, outputs = [adapters.stage_tensors(stage) for stage in (1, 2)], logits(adapters.base, questions("bert"))
    name = next(iter(chain[1]))
    other = random_chain(adapters, 4)
    for wrong, message in (
        ([other[1]], "stage 1 must hold the tensors of its group and the head, got none named"),
        ([other[0], {**other[1], "more": torch.ones(1)}], "stage 2 must hold .* got one named more"),
        ([other[0], {**other[1], name: torch.ones(1)}], r"stage 2 must hold .* of shape \(2, 16\), got \(1,\)"),
        ([*other, other[0]], "chain must hold at most 4 stages, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.load(wrong)
    assert logits(adapters.base, questions("bert")) == outputs
    assert all(same_tensors(one, adapters.stage_tensors(stage)) for stage, one in enumerate(before, start=1))


@pytest.mark.parametrize("family", ["bert", "gpt2"])  # the second has tied weights
def test_where_weights_begin_in_memory_does_not_depend_on_the_file(tmp_path: Path, family: str) -> None:
    """Kernels round by it, and the length of a file's header would decide."""
    folder = Path(write_base(tmp_path / "base", family))
    tensors = load_file(folder / "model.safetensors")
    for length in range(0, 64, 8):
        save_file(tensors, folder / "model.safetensors", {"format": "pt", "note": "x" * length})
        model = load_base(folder)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in (*model.parameters(), *model.buffers()))
        if family == "gpt2":
            assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_projections_of_more_than_records_are_refused() -> None:
    with pytest.raises(ValueError, match="see a batch's records alone, got DeBERTa"):
        SlicedAdapters(tiny_model("deberta-v2"), S3TConfig("model", slices=2))
