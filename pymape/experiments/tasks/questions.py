"""Extractive question answering: questions about articles in a SQuAD file, and a pretrained encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from pymape.checkpoint import load_tokenizer
from pymape.experiments.tasks.base import VALIDATION, Record, Split, Task, check_max_length, digest, read_bytes

__all__ = ["make_questions"]

_LEAST = 5  # articles: one for validation, one for the test, and three to train on


def make_questions(data: str, model: str, max_length: int = 256, articles: int | None = None) -> Task:
    """Questions whose answers are spans of a paragraph; those about one article are a group.

    A paragraph that does not fit beside its question is cut into windows that overlap by a quarter of `max_length`,
    wherever the answer may be, and the first that holds the whole answer is taken. So the place of an answer in its
    window tells no more than its place in the paragraph does. Left out, and counted in the task's facts, are questions
    without an answer, those longer than half of `max_length`, and those whose answer fits in no window.

    A fifth of the articles, drawn by the seed, is for validation and a fifth for the test.

    Args:
        data: file in SQuAD's JSON, plain or gzipped: articles with paragraphs with questions with answers, of which the
            first is taken.
        model: folder of an encoder and its fast tokenizer; it gets a new task head.
        max_length: tokens of a question with its window.
        articles: draw so many by the seed before anything else; None takes all.

    Raises:
        ValueError: a file of another form, answers that are not where the file says, too few articles, or a
            `max_length` beyond the model's learned positions.
    """
    content = read_bytes(Path(data))
    tokenizer = load_tokenizer(model)
    check_max_length(AutoModelForQuestionAnswering, model, max_length)
    records: list[Record] = []
    groups: dict[str, str] = {}
    total = 0
    for title, rows in _articles(content):
        total += len(rows)
        found = _encode(tokenizer, rows, max_length)
        records += found
        groups |= {record["id"]: title for record in found}
    if len(groups) < len(records):
        raise ValueError(f"task.data must give every question its own id, got {len(records) - len(groups)} repetitions")
    names = list(dict.fromkeys(groups.values()))
    count = len(names) if articles is None else articles
    if not _LEAST <= count <= len(names):
        raise ValueError(f"articles must be in [{_LEAST}, {len(names)}], got {count}")

    def split(seed: int) -> Split:
        drawn = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        apart = round(VALIDATION * count)

        def of(places: list[int]) -> list[Record]:
            chosen = {names[place] for place in places}
            return [record for record in records if groups[record["id"]] in chosen]

        return Split(of(drawn[2 * apart :]), of(drawn[:apart]), of(drawn[apart : 2 * apart]), groups)

    def start(seed: int) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForQuestionAnswering.from_pretrained(model, local_files_only=True)

    files = sorted(path for path in Path(model).iterdir() if path.is_file())
    facts = {"articles": len(names), "questions": total, "questions left out": total - len(records)}
    return Task(0, digest(content, *(path.read_bytes() for path in files)), split, start, facts=facts)


def _articles(content: bytes) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Title and questions of each article; a question has its `context`, and `start` and `end` of its answer there."""
    try:
        for article in json.loads(content)["data"]:
            rows: list[Mapping[str, Any]] = []
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    row = {"id": asked["id"], "question": asked["question"].strip(), "context": paragraph["context"]}
                    for answer in asked["answers"][:1]:
                        first, text = answer["answer_start"], answer["text"]
                        if not text.strip() or not paragraph["context"].startswith(text, first):
                            raise ValueError(f"answers must be at their answer_start, got another at {asked['id']!r}")
                        first += len(text) - len(text.lstrip())
                        row |= {"start": first, "end": first + len(text.strip())}
                    rows.append(row)
            yield article["title"], rows
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"task.data must be a file in SQuAD's JSON, got {type(error).__name__}: {error}") from error


def _encode(tokenizer: Any, rows: list[Mapping[str, Any]], max_length: int) -> list[Record]:
    """Records of the questions that can be used."""
    asked = tokenizer([row["question"] for row in rows], add_special_tokens=False)["input_ids"]
    rows = [row for row, tokens in zip(rows, asked, strict=True) if "start" in row and 2 * len(tokens) <= max_length]
    if not rows:
        return []
    encoded = tokenizer(
        [row["question"] for row in rows],
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=max_length,
        stride=max_length // 4,
        return_overflowing_tokens=True,
    )
    of = encoded.pop("overflow_to_sample_mapping")
    found: dict[int, Record] = {}
    for window, number in enumerate(of):
        row = rows[number]
        places = [encoded.char_to_token(window, place, sequence_index=1) for place in (row["start"], row["end"] - 1)]
        if number not in found and None not in places:
            inputs = {name: values[window] for name, values in encoded.items()}
            found[number] = {"id": row["id"], **inputs, "start_positions": places[0], "end_positions": places[1]}
    return [found[number] for number in sorted(found)]
