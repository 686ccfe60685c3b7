"""train_stage: a pure function, bit by bit, whatever surrounds it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import threads
from model_zoo import DECODERS, tiny_batch, tiny_model
from peft import get_peft_model
from s3t_tools import (
    FAMILIES,
    LENGTH,
    SEQUENCE,
    Slices,
    make_job,
    options,
    parts,
    same_tensors,
    setting,
    tensors_of,
    train_chain,
    write_base,
)

from pymape.prefix_cache import PrefixCache
from pymape.s3t import training
from pymape.s3t.adapters import SlicedAdapters
from pymape.s3t.config import LoraConfig, S3TConfig, StageConfig
from pymape.s3t.frozen_base import load_base
from pymape.s3t.rows import RecordCheck, stack_rows
from pymape.s3t.stages import Provenance, StageKey, decode_row, encode_row, pack_stage, unpack_stage
from pymape.s3t.training import StageJob, config_digest, environment, stage_seed, train_stage


@pytest.fixture
def bert(tmp_path: Path) -> tuple[S3TConfig, Slices]:
    return setting(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_survives_a_deletion_is_what_training_without_it_gives(family: str, tmp_path: Path) -> None:
    config, slices = setting(tmp_path, family)
    cache = tmp_path / "cache"
    files = train_chain(config, SEQUENCE, slices, cache=cache)
    for depth in range(5):
        # The record lies in the slice at this depth of the chain; the prefix before it survives.
        rest = [[*rows] for rows in slices]
        gone = rest[SEQUENCE[depth]].pop(1)["id"] if depth < 4 else None
        if gone is not None:
            PrefixCache(cache).erase([gone])
        alone = train_chain(config, SEQUENCE[:depth], rest)  # on those slices, from scratch
        assert alone == files[:depth]
        adapters = SlicedAdapters(load_base(config.model), config)
        adapters.load(tensors_of(alone))
        for stage in range(1, depth + 1):
            held, own = adapters.stage_tensors(stage), unpack_stage(files[stage - 1])[0]
            groups = [{name: t for name, t in one.items() if ".lora_" in name} for one in (held, own)]
            assert same_tensors(*groups)
        if depth:  # the head of the served depth
            assert same_tensors(adapters.stage_tensors(depth), unpack_stage(files[depth - 1])[0])
    # A chain that took up another slice in between has other bits from there on, and the same before.
    other = train_chain(config, (2, 0, 1, 3), slices, cache=cache)
    assert other[:2] == files[:2]
    assert not any(same_tensors(*pair) for pair in zip(*map(tensors_of, (other[2:], files[2:])), strict=True))


def test_training_is_the_plain_loop(tmp_path: Path) -> None:
    """Against PEFT and torch alone: batches, loss, clipping, schedule and what is trained, at depth 1."""
    stage = StageConfig(epochs=3, lr=5e-3, batch_size=4, max_length=LENGTH, weight_decay=0.1, max_grad_norm=0.5)
    config, slices = setting(tmp_path, stage=stage, lora=LoraConfig(r=2, alpha=3.0, rslora=True))
    key = StageKey(1, (0,), 2)
    found, provenance = unpack_stage(train_stage(make_job(config, key, slices)))

    model = load_base(config.model)
    export = SlicedAdapters(load_base(config.model), config).export_config(1)
    export.inference_mode = False
    wrapped = get_peft_model(model, export).eval()
    trained = {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == found.keys()
    generator = torch.Generator().manual_seed(provenance.seed)
    for projection in ("query", "value"):
        drawn = torch.empty(2, 16)
        torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        name = f"base_model.model.bert.encoder.layer.3.attention.self.{projection}.lora_A.weight"
        trained[name].data.copy_(drawn)
    torch.randint(2**62, (), generator=generator)  # the seed of dropout
    optimizer = torch.optim.AdamW([trained[name] for name in found], lr=5e-3, weight_decay=0.1)
    schedule = [1 / 0.6, *[(6 - step) / 5.4 for step in range(1, 6)]]
    rows = slices[0]
    for step in range(6):
        if step % 2 == 0:
            order = torch.randperm(5, generator=generator).tolist()
        counting = order[:4] if step % 2 == 0 else order[4:]
        batch = [rows[row] for row in (counting if len(counting) == 4 else counting * 4)]
        ids = torch.tensor([row["input_ids"] + [0] * (LENGTH - len(row["input_ids"])) for row in batch])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (LENGTH - len(row["input_ids"])) for row in batch])
        labels = torch.tensor([row["labels"] for row in batch])
        outputs = wrapped(input_ids=ids, attention_mask=mask)
        loss = F.cross_entropy(outputs.logits[: len(counting)], labels[: len(counting)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 0.5)
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, schedule[step])
        optimizer.step()
    for name, value in found.items():
        torch.testing.assert_close(value, trained[name].detach(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "gpt2"])
def test_every_stage_learns_and_has_a_head_of_its_own(family: str, tmp_path: Path) -> None:
    stage = StageConfig(epochs=8, lr=2e-2, batch_size=4, max_length=LENGTH)
    config, slices = setting(tmp_path, family, stage=stage)
    chain = tensors_of(train_chain(config, SEQUENCE, slices))
    heads = [{name: value for name, value in one.items() if ".lora_" not in name} for one in chain]
    assert bool(heads[0]) == (family not in DECODERS)
    for name in heads[0]:
        assert len({head[name].numpy().tobytes() for head in heads}) == 4
    adapters = SlicedAdapters(load_base(config.model), config)
    for depth in range(1, 5):
        rows = [decode_row(encode_row(row)) for part in SEQUENCE[:depth] for row in slices[part]]
        batch, losses = stack_rows(adapters.base, rows, LENGTH), []
        for trained in (depth - 1, depth):
            adapters.load(chain[:trained])
            with torch.no_grad():
                losses.append(adapters.base(**batch).loss.item())
        assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("family", "task", "heads"),
    [
        ("bert", "token_classification", 2),
        ("bert", "multi_label", 2),
        ("bert", "masked_lm", 0),
        ("llama", "sequence_classification", 1),
        ("bert", None, 2),
    ],
)
def test_other_tasks_and_new_heads(family: str, task: str | None, heads: int, tmp_path: Path) -> None:
    tiny_model(family, task or "base", num_hidden_layers=4, intermediate_size=32).save_pretrained(tmp_path / "base")
    config = options(str(tmp_path / "base"), labels=None if task else 3)
    batch = tiny_batch(family, task, batch=10, length=LENGTH, padding="right")
    records = [{"id": f"r{row}", **{name: value[row] for name, value in batch.items()}} for row in range(10)]
    check = RecordCheck(config)
    assert [check(record, record["id"]) for record in records] == [encode_row(record) for record in records]
    files = train_chain(config, SEQUENCE, parts(records))
    assert train_chain(config, SEQUENCE, parts(records), cache=tmp_path / "cache") == files
    assert all(sum(".lora_" not in name for name in tensors) == heads for tensors in tensors_of(files))


def disturb(config: S3TConfig, slices: Slices) -> None:
    """What a process may have done before."""
    torch.manual_seed(random.randrange(1000))
    torch.rand(17)
    train_chain(dataclasses.replace(config, seed=9), (1, 3), slices)
    wild = dataclasses.replace(config, stage=dataclasses.replace(config.stage, lr=1e38))
    with pytest.raises(ValueError, match="must be finite"):
        train_chain(wild, (0, 1), slices)


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_bits_depend_on_nothing_around(family: str, tmp_path: Path) -> None:
    config, slices = setting(tmp_path, family, lora=LoraConfig(r=2, dropout=0.2))
    expected = train_chain(config, SEQUENCE[:2], slices)
    disturb(config, slices)
    assert train_chain(config, SEQUENCE[:2], slices) == expected
    with threads(3), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert train_chain(config, SEQUENCE[:2], slices) == expected
    with torch.inference_mode():
        training._loaded = None
        assert train_chain(config, SEQUENCE[:2], slices) == expected
    job = make_job(config, StageKey(0, SEQUENCE[:1]), slices)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.set_default_device("meta")
    try:
        assert train_stage(job) == expected[0]
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    # Another folder, and records of other names.
    moved = dataclasses.replace(config, model=str(shutil.move(config.model, tmp_path / "moved")))
    training._loaded = None
    assert train_chain(moved, SEQUENCE[:2], slices) == expected
    renamed = [[{**row, "id": f"another {row['id']}"} for row in rows] for rows in slices]
    again = train_chain(moved, SEQUENCE[:2], renamed)
    assert all(same_tensors(*pair) for pair in zip(tensors_of(again), tensors_of(expected), strict=True))
    # Where a chain stands among others does not count, but its shard and generation do.
    others = [train_chain(moved, SEQUENCE[:1], slices, **place)[0] for place in ({"shard": 1}, {"generation": 1})]
    assert len({file[-64:] for file in (*others, expected[0])}) == 3


def test_a_stage_leaves_the_process_as_it_was(bert: tuple[S3TConfig, Slices]) -> None:
    config, slices = bert
    before = torch.get_rng_state()
    with threads(2):
        train_chain(config, (0,), slices)
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="must be finite"):
            train_chain(options(config.model, stage=dataclasses.replace(config.stage, lr=1e38)), (0,), slices)
        assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


WORKER = """
import pickle, sys, torch
torch.rand(int(sys.argv[3]))
from pymape.s3t.training import train_stage
jobs = pickle.load(open(sys.argv[1], "rb"))
pickle.dump([train_stage(job) for job in jobs[:: int(sys.argv[4])]], open(sys.argv[2], "wb"))
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path: Path) -> None:
    jobs: list[StageJob] = []
    files: list[bytes] = []
    for family in ("bert", "vit", "llama"):
        config, slices = setting(tmp_path / family, family, lora=LoraConfig(r=2, dropout=0.2))
        chain = train_chain(config, SEQUENCE, slices)
        files += chain
        for depth in range(1, 5):
            key = StageKey(0, SEQUENCE[:depth])
            jobs.append(make_job(config, key, slices, chain[: depth - 1], cache=tmp_path / "cache"))
    (tmp_path / "jobs").write_bytes(pickle.dumps(jobs))
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", WORKER, str(tmp_path / "jobs"), str(out), "5", "-1"]  # in the opposite order
    subprocess.run(command, check=True, env=environment, timeout=300)
    assert pickle.loads(out.read_bytes()) == files[::-1]


def test_what_is_frozen_stays_frozen(bert: tuple[S3TConfig, Slices], monkeypatch: pytest.MonkeyPatch) -> None:
    config, slices = bert
    files = train_chain(config, (0, 1), slices)
    job = make_job(config, StageKey(0, (0, 1)), slices, files[:1])

    used: list[SlicedAdapters] = []
    adapters_of = training._adapters
    monkeypatch.setattr(training, "_adapters", lambda job: used.append(adapters_of(job)) or used[-1])

    @torch.no_grad()
    def touch(name: str) -> None:
        next(p for n, p in used[-1].base.named_parameters() if n.startswith(name))[0] += 1e-3

    for name, message in (
        ("bert.encoder.layer.0.attention.self.query", "base must stay frozen"),
        ("classifier.original_module", "base must stay frozen"),
        ("bert.encoder.layer.3.attention.self.query.lora_A", "earlier stages must stay frozen"),
    ):
        with pytest.raises(ValueError, match=f"{message}.* while stage shard00-0.1-g0 was trained"):
            train_stage(job, progress=lambda done, total, name=name: touch(name))
        assert train_stage(job) == files[1]
    touch("bert.encoder.layer.1.output.dense")  # between two stages
    with pytest.raises(ValueError, match="base must stay frozen"):
        train_stage(job)
    assert train_stage(job) == files[1]


def test_a_job_that_is_not_its_provenance_is_refused(bert: tuple[S3TConfig, Slices]) -> None:
    config, slices = bert
    files = train_chain(config, (0, 1, 2), slices)
    job = make_job(config, StageKey(0, (0, 1, 2)), slices, files[:2])
    first, second, third = job.rows
    changed = ((first[0][0], second[0][1]), *first[1:])
    wrong = dataclasses.replace(job.provenance, seed=1)
    other = train_chain(dataclasses.replace(config, seed=1), (0, 1), slices)
    renewed = train_chain(config, (0, 1), slices, generation=1)
    fewer = train_chain(config, (0, 1), [slices[0][1:], *slices[1:]])
    for change, message in (
        ({"config": options(config.model, lora=LoraConfig(r=3))}, "config of stage .* got other options"),
        ({"provenance": wrong}, "seed of stage shard00-0.1.2-g0 must be .*, got 1"),
        ({"rows": (changed, second, third)}, "rows of slice 0 of stage .* must be those of its provenance"),
        ({"rows": (first[1:], second, third)}, "rows of slice 0 of stage .* must be those of its provenance"),
        ({"rows": (second, first, third)}, "rows of slice 0 of stage .* must be those of its provenance"),
        ({"rows": (first, second)}, "must come with 3 slices and 2 parents, got 2 and 2"),
        ({"rows": (first, second, second)}, "at least one record and each once, got 15 of 10 records"),
        ({"rows": ((), (), ())}, "at least one record and each once, got 0 of 0 records"),
        ({"parents": files[:1]}, "must come with 3 slices and 2 parents, got 3 and 1"),
        ({"parents": (files[1], files[0])}, "parent 1 of stage .* must have the key"),
        ({"parents": tuple(other)}, "parent 1 of stage .* must have the seed"),
        ({"parents": tuple(fewer)}, "parent 1 of stage .* must have the records"),
        ({"parents": (files[0], renewed[1])}, "parent 2 of stage .* must have the parent"),
        ({"parents": tuple(renewed)}, "parent of stage .* must be the file"),
        ({"parents": (files[0], files[1][:-1])}, "parent 2 of stage .* must be a safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            train_stage(dataclasses.replace(job, **change))
    assert train_stage(job) == files[2]
    # A repaired chain goes on from the parents that are alive.
    mixed = train_chain(config, (0, 1, 2), slices, generation=1, parents=files[:1])
    assert [unpack_stage(file)[1].key.generation for file in mixed] == [0, 1, 1]
    write_base(Path(config.model), "bert", seed=1)
    training._loaded = None
    with pytest.raises(ValueError, match=r"model must be the base .* that the system was made with, got .* in "):
        train_stage(job)


def test_every_record_counts(bert: tuple[S3TConfig, Slices]) -> None:
    # SISA's public code leaves the remainder of the last slice out of its hash: deleting it changes nothing.
    config, slices = bert
    for part in (0, 3):
        seen = {train_chain(config, (part,), slices)[0][-200:]}
        for row in range(len(slices[part])):
            rest = [*slices]
            rest[part] = [record for place, record in enumerate(slices[part]) if place != row]
            job = make_job(config, StageKey(0, (part,)), rest)
            assert job.provenance != make_job(config, StageKey(0, (part,)), slices).provenance
            seen.add(train_stage(job)[-200:])
        assert len(seen) == 1 + len(slices[part])


def test_few_records_and_their_order(bert: tuple[S3TConfig, Slices]) -> None:
    config, slices = bert
    one = [slices[0][:1]]
    single = tensors_of(train_chain(config, (0,), one))[0]
    assert all(torch.isfinite(value).all() for value in single.values())
    assert not torch.equal(single["base_model.model.classifier.bias"], torch.zeros(3))
    turned, ingested = (train_chain(config, (0,), [part])[0] for part in (slices[0][::-1], slices[0]))
    (other, other_from), (own, own_from) = unpack_stage(turned), unpack_stage(ingested)
    assert not same_tensors(other, own)
    assert other_from == own_from  # the order is the ledger's to keep


def test_progress_and_environment(bert: tuple[S3TConfig, Slices]) -> None:
    config, slices = bert
    steps: list[tuple[int, int]] = []
    job = make_job(config, StageKey(0, (0,)), slices)
    content = train_stage(job, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(done, 4) for done in (1, 2, 3, 4)]
    found = unpack_stage(content, provenance=job.provenance)[1]
    assert found.environment["threads"] == "1"
    assert found.environment["torch"] == version("torch")
    assert found.environment.keys() >= {"python", "transformers", "peft", "processor", "instructions", "device"}
    assert pack_stage(*unpack_stage(content)) == content
    more = dataclasses.replace(config, stage=dataclasses.replace(config.stage, threads=2))
    assert unpack_stage(train_stage(make_job(more, job.provenance.key, slices)))[1].environment["threads"] == "2"


def test_the_provenance_of_a_job_follows_from_what_it_holds() -> None:
    config, base, key = options("model"), "0" * 64, StageKey(1, (2, 0), 3)
    rows = [(("b", b"two"), ("a", b"one")), (("c", b"three"),)]
    job = StageJob.of(config, key, base, rows, [b"parent"], "cache")
    assert (job.config, job.rows, job.parents, job.cache, job.begin) == (config, (*rows,), (b"parent",), "cache", None)
    own = {name: hashlib.sha256(content).hexdigest() for part in rows for name, content in part}
    lines = f"a {own['a']}\nb {own['b']}\n", f"c {own['c']}\n"
    assert job.provenance == Provenance(
        key,
        base,
        config_digest(config),
        stage_seed(config.seed, key),
        hashlib.sha256(b"parent").hexdigest(),
        {part: hashlib.sha256(line.encode()).hexdigest() for part, line in zip(key.prefix, lines, strict=True)},
    )
    assert StageJob.of(config, StageKey(1, (2,)), base, rows[:1]).provenance.parent is None
    resumed = StageJob.of(config, StageKey(1, (2,)), base, rows[:1], begin=b"before")
    assert resumed.begin == b"before"
    assert resumed.provenance.parent == hashlib.sha256(b"before").hexdigest()
    with pytest.raises(ValueError, match=r"records must cover the slices \[0, 2\], got \[2\]"):
        StageJob.of(config, key, base, rows[:1], [b"parent"])


def test_seed_and_digest() -> None:
    keys = [StageKey(m, p, g) for m in (0, 1) for p in ((1,), (1, 2), (2, 1), (12,)) for g in (0, 1)]
    seeds = {stage_seed(master, key) for key in keys for master in (0, 1)}
    assert len(seeds) == 2 * len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stage_seed(7, StageKey(1, (2, 0), 3)) == 1389719521695177943
    config = options("model")
    for same in (
        dataclasses.replace(config, model="elsewhere", shards=9, sequences=2, method="cyclic", seed=5),
        dataclasses.replace(config, lora=LoraConfig(r=2, alpha=4)),
    ):
        assert config_digest(same) == config_digest(config)
    for name, value in dataclasses.asdict(config.stage).items():
        other = "cuda" if name == "device" else value + 1
        changed = dataclasses.replace(config, stage=dataclasses.replace(config.stage, **{name: other}))
        assert config_digest(changed) != config_digest(config)


def test_options_of_systems_that_knew_no_device_keep_their_digest() -> None:
    config = S3TConfig("m", slices=3, stage=StageConfig(threads=2, lr=0.5), lora=LoraConfig(r=4))
    assert config_digest(config) == "d7b5739e69198a88e54a7c3ea115cd3d03c2c59d60dd616f151c1ec20bf73f26"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(bert: tuple[S3TConfig, Slices]) -> None:
    config, slices = bert
    config = options(config.model, stage=dataclasses.replace(config.stage, device="cuda"))
    with pytest.raises(ValueError, match=r"stage\.device must be 'cpu' on a machine without a GPU, got 'cuda'"):
        train_chain(config, (0,), slices)


def test_on_a_gpu_what_has_no_deterministic_algorithm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def state() -> tuple[bool, ...]:
        cudnn = torch.backends.cudnn
        deterministic = torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        return deterministic, warns, cudnn.enabled, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32

    before = state()
    with contextlib.suppress(ZeroDivisionError), training._deterministic_gpu() as number:
        assert number == 3
        assert state() == (True, False, True, True, False, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        raise ZeroDivisionError
    assert state() == before


def test_the_environment_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    own, other = environment("cpu"), environment("cuda")
    assert own["device"] == "cpu"
    assert other["device"] == "Some GPU"
    assert other.keys() - own.keys() == {"cuda", "cudnn"}
