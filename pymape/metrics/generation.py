"""Questions with answers as records of a causal language model, and what the model answers by itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from pymape.data.positions import most_tokens
from pymape.forward import eval_mode
from pymape.losses import IGNORED_LABEL

__all__ = ["TEMPLATE", "answer_records", "answer_text", "generate_answers"]

TEMPLATE = "Question: {question}\nAnswer: {answer}"


def answer_records(
    tokenizer: Any,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    ids: Sequence[str],
    template: str = TEMPLATE,
    max_length: int = 512,
) -> list[dict[str, Any]]:
    """Records of which only the answer, and an end-of-text token that the tokenizer puts behind it, is labelled.

    Args:
        tokenizer: a fast tokenizer.
        questions: [N] texts.
        answers: [N] texts.
        ids: [N] ids of the records.
        template: text of a record, with {question} before {answer}; the one that the model was trained with.
        max_length: tokens a text is cut to.

    Returns:
        [N] dicts with id, input_ids, attention_mask and labels. A token that the answer shares with the text before it
        (its leading space, say) is labelled.

    Raises:
        ValueError: a template without its fields, a slow tokenizer, lists of different lengths, a question or answer
            that is no text, or an answer that is empty or begins beyond `max_length`.
    """
    before, field, after = template.partition("{answer}")
    if not field or "{question}" not in before:
        raise ValueError(f"template must hold {{question}} before {{answer}}, got {template!r}")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer must be a fast one, which tells where tokens are, got {type(tokenizer).__name__}")
    counts = [len(column) for column in (questions, answers, ids)]
    if len(set(counts)) > 1:
        raise ValueError(f"questions, answers and ids must be of one length, got {counts}")
    for name, *texts in zip(ids, questions, answers, strict=True):
        for what, text in zip(("questions", "answers"), texts, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"{what} must be texts, got {text!r} for id {name!r}")
        if not texts[1].strip():
            raise ValueError(f"answers must not be empty, got one with id {name!r}")
    prompts = [before.replace("{question}", question) for question in questions]
    texts = [prompt + answer + after for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
    records = []
    for row, (name, prompt, answer) in enumerate(zip(ids, prompts, answers, strict=True)):
        tokens, places = encoded["input_ids"][row], encoded["offset_mapping"][row]
        start = next((place for place, (_, end) in enumerate(places) if end > len(prompt)), None)
        if not start:
            raise ValueError(f"answers must begin within max_length {max_length} and after a token, got id {name!r}")
        end = len(prompt) + len(answer)  # what comes behind, but for a special token, is the template's
        labels = [
            token if place >= start and (span[0] < end or tuple(span) == (0, 0)) else IGNORED_LABEL
            for place, (token, span) in enumerate(zip(tokens, places, strict=True))
        ]
        mask = encoded["attention_mask"][row]
        records.append({"id": name, "input_ids": tokens, "attention_mask": mask, "labels": labels})
    return records


def answer_text(tokenizer: Any, record: dict[str, Any]) -> str:
    """Text of a record's labelled tokens."""
    tokens = [token for token in record["labels"] if token != IGNORED_LABEL]
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 200,
    batch_size: int = 32,
) -> list[str]:
    """Continue every record from where its labels begin, by greedy decoding in eval mode.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        records: with `input_ids` and `labels`, at least one token before the first label.
        max_new_tokens: most tokens of an answer; open-unlearning's is 200. An answer ends earlier where the model's
            learned positions do.
        batch_size: records at a time.

    Returns:
        [N] texts without special tokens.

    Raises:
        ValueError: a record without a prompt, or with one that is longer than the model's learned positions.
    """
    prompts = [record["input_ids"][: _first_label(record)] for record in records]
    if not all(prompts):
        raise ValueError("records must have a token before the first label, got one whose first token is labelled")
    longest, limit = max(map(len, prompts), default=0), most_tokens(model)
    if limit is not None and longest > limit:
        raise ValueError(f"records must have prompts of at most {limit} tokens for this model, got {longest}")
    # The last token of an answer needs no position; batches share their limit, so that no answer depends on others.
    room = [max_new_tokens if limit is None else min(max_new_tokens, limit + 1 - len(prompt)) for prompt in prompts]
    device = next(model.parameters()).device
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    fill = next((token for token in (pad, end) if token is not None), 0)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # little padding
    alike = [list(rows) for _, rows in groupby(order, key=room.__getitem__)]
    batches = [rows[start : start + batch_size] for rows in alike for start in range(0, len(rows), batch_size)]
    answers = [""] * len(prompts)
    generate: Any = model.generate
    with eval_mode(model):
        for rows in batches:
            width = len(prompts[rows[0]])
            padding = [width - len(prompts[row]) for row in rows]  # on the left: a text goes on at its end
            tokens = [[fill] * missing + list(prompts[row]) for row, missing in zip(rows, padding, strict=True)]
            mask = [[0] * missing + [1] * (width - missing) for missing in padding]
            output = generate(
                input_ids=torch.tensor(tokens, device=device),
                attention_mask=torch.tensor(mask, device=device),
                # What a checkpoint's own generation config may say otherwise.
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                max_new_tokens=room[rows[0]],
                eos_token_id=end,
                pad_token_id=fill,
            )
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text.strip()
    return answers


def _first_label(record: dict[str, Any]) -> int:
    return next(place for place, label in enumerate(record["labels"]) if label != IGNORED_LABEL)
