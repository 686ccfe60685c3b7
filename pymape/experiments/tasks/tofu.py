"""TOFU: questions about invented authors, and a small Llama-type model that is trained on them from scratch."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pymape.data.records import ALTERNATIVE
from pymape.experiments.tasks.base import Forgetting, Record, Split, Task, digest, read_bytes
from pymape.metrics import QuestionSet, answer_records

__all__ = ["make_tofu"]

_PAD, _END = "<|padding|>", "<|endoftext|>"
_COLUMNS = ("question", "answer", "perturbed_answer", "paraphrased_answer")  # in the order of QuestionSet
_LEAST = 258  # tokens: the bytes and the two special ones
_AUTHOR = 20  # questions about each author, one after the other
_LLAMA: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 352,
    "max_position_embeddings": 512,
}


def make_tofu(
    data: str,
    authors: int = 40,
    held_out: int | str = 16,
    vocab_size: int = 2048,
    questions: int | None = None,
    **model: Any,
) -> Task:
    """Questions about the last authors of TOFU; those about one author are a group.

    Forgetting the last 2, 10 or 20 groups is TOFU's own forget01, forget05 or forget10. The records are the same for
    every seed, which fixes the initial weights and the order of training.

    The model is trained from scratch and knows nothing but the answers about its training authors. So it is not asked
    about TOFU's real authors and world facts, and the utility that can be told is that of the retain set. Nor has it
    learned language from anything else: what it forgets was learned by rote.

    The tokenizer is a byte-level BPE trained on the questions and answers about all authors, whatever the model is
    trained on. Its vocabulary tells how frequent pieces of words are in the whole corpus, of which the forget set is a
    part; the retrained model has that too.

    Args:
        data: folder of TOFU's files, JSON Lines, plain or gzipped: full.json, forget10_perturbed.json,
            retain_perturbed.json; and idontknow.txt, whose lines are in turn the records' alternative answers.
        authors: train on so many, the last ones.
        held_out: so many authors before those are never trained on; or, where none are left, the name of a file of
            further questions, without .json. The first half is for validation, the second for the test.
        vocab_size: most tokens of the tokenizer, at least 258.
        questions: most retain questions for TOFU's figures, evenly spaced; None takes all that have wrong answers:
            those of retain_perturbed.json where they are kept, else those of forget10_perturbed.json.
        model: arguments of `LlamaConfig`.

    Raises:
        ValueError: a file that is missing or not as TOFU's, or an option out of range.
    """
    _check(model, authors, held_out, vocab_size, questions)
    folder = Path(data)
    full, kept, lost = (_rows(folder, name) for name in ("full", "retain_perturbed", "forget10_perturbed"))
    unsure = _read(folder, "idontknow.txt").splitlines()
    ids = [f"question-{place:04}" for place in range(len(full))]
    first = len(full) - _AUTHOR * authors
    start = first if isinstance(held_out, str) else first - _AUTHOR * held_out
    if start < 0:
        raise ValueError(
            f"authors and held_out must be at most {len(full) // _AUTHOR} together, got {authors} and {held_out}"
        )
    own = _joined(kept, "retain_perturbed", full, ids, 0)
    wrong = own | _joined(lost, "forget10_perturbed", full, ids, len(full) - len(lost))
    tokenizer = _tokenizer([text for row in full for text in (row["question"], row["answer"])], vocab_size)
    config = LlamaConfig(
        **{**_LLAMA, **model}, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip

    def encode(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Record]:
        asked, length = [row["question"] for row in rows], config.max_position_embeddings
        answers = [row["answer"] for row in rows]
        others = [unsure[place % len(unsure)] for place in range(len(rows))]
        records = answer_records(tokenizer, asked, answers, ids=names, max_length=length)
        for record, other in zip(
            records, answer_records(tokenizer, asked, others, ids=names, max_length=length), strict=True
        ):
            record |= {f"{ALTERNATIVE}{name}": value for name, value in other.items() if name != "id"}
        return records

    trained = encode(ids[first:], full[first:])
    if isinstance(held_out, str):
        rows = _rows(folder, held_out)
        unseen = encode([f"{held_out}-{place:04}" for place in range(len(rows))], rows)
    else:
        unseen = encode(ids[start:first], full[start:first])
    half = len(unseen) // 2
    groups = {name: f"author-{place // _AUTHOR:03}" for place, name in enumerate(ids)}
    divided = Split(trained, unseen[:half], unseen[half:], groups)

    def start_model(seed: int) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(copy.deepcopy(config))

    def ask(data: Forgetting) -> dict[str, QuestionSet]:
        asked = {"forget": [record["id"] for record in data.forget if record["id"] in wrong]}
        candidates = [record["id"] for record in data.retain if record["id"] in wrong]
        candidates = [name for name in candidates if name in own] or candidates
        count = len(candidates) if questions is None else min(questions, len(candidates))
        asked["retain"] = [candidates[place * len(candidates) // count] for place in range(count)]
        return {
            part: QuestionSet(
                names,
                *([wrong[name][column] for name in names] for column in _COLUMNS),
            )
            for part, names in asked.items()
            if names
        }

    content = json.dumps([trained, unseen, wrong]).encode()
    fingerprint = digest(content, tokenizer.backend_tokenizer.to_str().encode())
    return Task(0, fingerprint, lambda _: divided, start_model, tokenizer, ask)


def _check(model: Mapping[str, Any], authors: int, held_out: int | str, vocab_size: int, questions: int | None) -> None:
    unknown = sorted(set(model) - set(LlamaConfig().to_dict()))
    if unknown:
        raise ValueError(f"task.options must be arguments of LlamaConfig, got {', '.join(unknown)}")
    least = {"authors": (authors, 2), "vocab_size": (vocab_size, _LEAST)}
    least |= {} if isinstance(held_out, str) else {"held_out": (held_out, 1)}
    least |= {} if questions is None else {"questions": (questions, 1)}
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise ValueError(f"task.options.{name} must be at least {lowest}, got {value}")


def _read(folder: Path, name: str) -> str:
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise ValueError(f"task.data must hold {name} or {name}.gz, got neither in {str(folder)!r}")
    return read_bytes(path).decode()


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """Objects of a JSON Lines file that have a question and an answer."""
    try:
        rows = [json.loads(line) for line in _read(folder, f"{name}.json").split("\n") if line.strip()]
        if rows and all({"question", "answer"} <= row.keys() for row in rows):
            return rows
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{name}.json must be JSON Lines of objects, got {error}") from error
    raise ValueError(f"{name}.json must have a question and an answer on every line, got {len(rows)} lines")


def _joined(
    rows: Sequence[Mapping[str, Any]], name: str, full: Sequence[Mapping[str, Any]], ids: Sequence[str], first: int
) -> dict[str, Mapping[str, Any]]:
    """Rows with paraphrased and wrong answers by the ids of the rows of `full` from `first` on, which they repeat."""
    for place, row in enumerate(rows, first):
        if not {"paraphrased_answer", "perturbed_answer"} <= row.keys():
            raise ValueError(f"{name}.json must have paraphrased_answer and perturbed_answer, got {sorted(row)}")
        if not 0 <= place < len(full) or any(row[column] != full[place][column] for column in ("question", "answer")):
            raise ValueError(f"{name}.json must repeat the rows of full.json, got another at row {place - first}")
    return dict(zip(ids[first:], rows))


def _tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that ends every text with the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[_PAD, _END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    end = (_END, tokenizer.token_to_id(_END))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[end])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END)
