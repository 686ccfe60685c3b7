"""The loss of every sample by itself, by the convention of Hugging Face's own `loss`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "CLASSIFICATION",
    "IGNORED_LABEL",
    "LANGUAGE_MODEL",
    "LOGITS_AT_A_TIME",
    "QUESTION_ANSWERING",
    "base_model",
    "check_labels",
    "per_sample_loss",
    "sum_by_part",
    "task_of",
    "token_labels",
    "token_losses",
]

IGNORED_LABEL = -100
CLASSIFICATION, QUESTION_ANSWERING, LANGUAGE_MODEL = "classification", "question answering", "causal language model"
LOGITS_AT_A_TIME = 2**24  # raised to fp32: 64 MiB

# Part of the model's class name -> task; the first that fits decides, as in transformers itself.
_TASKS = {
    "ForSequenceClassification": CLASSIFICATION,
    "ForImageClassification": CLASSIFICATION,
    "ForTokenClassification": "token classification",
    "ForQuestionAnswering": QUESTION_ANSWERING,
    "ForMaskedLM": "masked language model",
    "ForCausalLM": LANGUAGE_MODEL,
    "LMHeadModel": LANGUAGE_MODEL,
    "ForConditionalGeneration": LANGUAGE_MODEL,  # of texts and images; encoder-decoder models are called so too
}


def per_sample_loss(model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor:
    """Loss of each sample of a batch as if the sample were alone in it.

    loss_n = mean over the sample's own labelled tokens of -log softmax(logits)[label]; for classification the sample's
    cross-entropy, mean binary cross-entropy (multi-label) or mean squared error (regression); for question answering
    the mean of the start and the end cross-entropy over the sample's own tokens.

    Args:
        model: Hugging Face model with a task head (its class name tells the task, its config the problem type).
        inputs: the batch, with `labels` ([B], [B, C] or [B, T]; -100 is not labelled) or `start_positions` and
            `end_positions` [B]; `attention_mask` [B, T] tells what padding is.
        outputs: what the model returned for the batch: `logits`, or `start_logits` and `end_logits`.

    Returns:
        [B] losses, fp32 (fp64 for fp64 logits). A sample with no labelled token has loss 0.

    Raises:
        ValueError: the model's task is not known, or the batch has no labels.
    """
    task = task_of(model)
    if task == QUESTION_ANSWERING:
        _require(model, inputs, "start_positions", "end_positions")
        start = _span_loss(outputs.start_logits, inputs["start_positions"], inputs.get("attention_mask"))
        end = _span_loss(outputs.end_logits, inputs["end_positions"], inputs.get("attention_mask"))
        return (start + end) / 2
    _require(model, inputs, "labels")
    logits = outputs.logits
    if task == CLASSIFICATION:
        labels = inputs["labels"].to(logits.device)
        return _classification_loss(_at_least_fp32(logits), labels, _problem_type(model.config, labels))
    labels = token_labels(task, inputs).to(logits.device)
    losses = token_losses(logits.flatten(0, 1), labels.flatten()).view_as(labels)
    return losses.sum(1) / (labels != IGNORED_LABEL).sum(1).clamp(min=1)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of every token; of a large vocabulary a part of the tokens at a time.

    No more than a part of the logits is held in fp32: it is computed anew in the backward pass, with the same bits.

    Args:
        logits: [n, V], floating.
        labels: [n] int64; -100 gives a loss of 0.

    Returns:
        [n] losses, fp32 (fp64 for fp64 logits).
    """
    return torch.cat(_by_part(_cross_entropy, logits, labels))


def sum_by_part(term: Callable[[Tensor, Tensor], Tensor], logits: Tensor, other: Tensor) -> Tensor:
    """Sum of a scalar `term` of rows of logits, raised to fp32, and rows of `other`; in parts as `token_losses`.

    Args:
        term: (logits [rows, V], other [rows, ...]) -> a scalar, a sum over the rows.
        logits: [n, V], floating.
        other: [n, ...].

    Returns:
        A scalar, fp32 (fp64 for fp64 logits).
    """
    return torch.stack(_by_part(term, logits, other)).sum()


def check_labels(model: nn.Module, inputs: Mapping[str, Tensor], ids: Sequence[str]) -> None:
    """Refuse a batch whose labels are missing or out of range, before a kernel would fail on them.

    Args:
        model: Hugging Face model with a task head.
        inputs: the batch, as for `per_sample_loss`.
        ids: [B] ids of the records, for the message.

    Raises:
        ValueError: naming the range, the value and the record; or rows or tokens that are not those of the records.
    """
    task = task_of(model)
    names = ("start_positions", "end_positions") if task == QUESTION_ANSWERING else ("labels",)
    _require(model, inputs, *names)
    labels, tokens = inputs[names[0]], inputs.get("input_ids")
    if len(labels) != len(ids):
        raise ValueError(f"collator must give one row per record, got {len(labels)} for {len(ids)}")
    if tokens is not None and tokens.ndim > 2:
        shape = tuple(tokens.shape[1:])
        raise ValueError(f"records must be single, without a batch dimension, got input_ids of shape {shape}")
    if task == QUESTION_ANSWERING:
        return None
    config: Any = model.config
    if task == CLASSIFICATION:
        problem = _problem_type(config, labels)
        if problem != "single_label_classification":
            width = labels.numel() // max(len(labels), 1)
            if width != config.num_labels:
                raise ValueError(
                    f"labels must have shape ({len(labels)}, {config.num_labels}) for {problem}, "
                    f"got {tuple(labels.shape)}"
                )
            return None
        classes, labelled = config.num_labels, torch.ones_like(labels, dtype=torch.bool)
    else:
        if tokens is not None and labels.shape != tokens.shape:
            raise ValueError(f"labels must have shape {tuple(tokens.shape)}, as input_ids, got {tuple(labels.shape)}")
        labels = token_labels(task, inputs)
        classes = config.num_labels if task == "token classification" else config.get_text_config().vocab_size
        labelled = labels != IGNORED_LABEL
        empty = (~labelled.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"labels must name at least one token of every record (all are {IGNORED_LABEL}), "
                f"got none for ids {[ids[row] for row in empty]}"
            )
    if labels.dtype == torch.bool or labels.is_floating_point():
        raise ValueError(f"labels must be integers, got {labels.dtype} for id {ids[0]!r}")
    wrong = ((labels < 0) | (labels >= classes)) & labelled
    if wrong.any():
        place = wrong.nonzero()[0]
        raise ValueError(
            f"labels must be in [0, {classes}), got {labels[tuple(place)].item()} for id {ids[int(place[0])]!r}"
        )
    return None


def token_labels(task: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """The label of each position's logits; nothing is labelled where padding is read or predicted.

    Args:
        task: "token classification", "masked language model" or "causal language model" (labels are then shifted).
        inputs: the batch: `labels` [B, T], and `attention_mask` [B, T] where it is padded.

    Returns:
        [B, T] int64, -100 where there is no label.
    """
    labels, mask = inputs["labels"], inputs.get("attention_mask")
    if mask is not None and mask.shape == labels.shape:
        own = mask.to(labels.device) != 0
        if task == LANGUAGE_MODEL:
            # Behind left padding the first token would be predicted from padding; alone it is not predicted at all.
            own = own & own.roll(1, 1)
        labels = labels.where(own, IGNORED_LABEL)
    if task == LANGUAGE_MODEL:
        # Shifting the labels instead of the logits spares a copy of the [B, T, vocabulary] logits.
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    return labels


def base_model(model: nn.Module) -> Any:
    """The model inside wrappers of PEFT and `torch.compile`, or the model itself."""
    get_base = getattr(model, "get_base_model", None)
    base = get_base() if callable(get_base) else model
    return getattr(base, "_orig_mod", base)


def task_of(model: nn.Module) -> str:
    """Task of a Hugging Face model, told from its class name (or that of a class it derives from).

    Args:
        model: the model; wrappers of PEFT and `torch.compile` are looked through.

    Returns:
        "classification", "token classification", "question answering", "masked language model" or
        "causal language model".

    Raises:
        ValueError: none of these.
    """
    base = base_model(model)
    for kind in type(base).__mro__:
        for part, task in _TASKS.items():
            if part in kind.__name__ and not (part == "ForConditionalGeneration" and base.config.is_encoder_decoder):
                return task
    raise ValueError(
        f"model must have a task head among {sorted(set(_TASKS.values()))}, got {type(base).__name__}; "
        "pass your own loss function instead"
    )


def _require(model: nn.Module, inputs: Mapping[str, Tensor], *names: str) -> None:
    missing = [name for name in names if inputs.get(name) is None]
    if missing:
        raise ValueError(f"data must have {' and '.join(missing)} for {type(model).__name__}, got {sorted(inputs)}")


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _problem_type(config: Any, labels: Tensor) -> str:
    """The rule of transformers, without its side effect of writing the answer into the model's config."""
    if config.problem_type is not None:
        return str(config.problem_type)
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _classification_loss(logits: Tensor, labels: Tensor, problem: str) -> Tensor:
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1), reduction="none")
    labels = labels.to(logits.dtype).view_as(logits)  # [B, C]
    if problem == "regression":
        return (logits - labels).square().mean(1)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)


def _by_part(term: Callable[[Tensor, Tensor], Tensor], logits: Tensor, other: Tensor) -> list[Tensor]:
    """`term` of a part of the rows after the other, each keeping nothing for its backward but its rows of logits."""

    def raised(part: Tensor, of_other: Tensor) -> Tensor:
        return term(_at_least_fp32(part), of_other)

    rows = max(1, LOGITS_AT_A_TIME // logits.shape[1])
    if len(logits) <= rows:
        return [raised(logits, other)]
    parts = zip(logits.split(rows), other.split(rows), strict=True)
    return [checkpoint(raised, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")


def _span_loss(logits: Tensor, positions: Tensor, attention_mask: Tensor | None) -> Tensor:
    logits = _at_least_fp32(logits)  # [B, T]
    positions = positions.to(logits.device).view(-1).clamp(min=0)
    # A position beyond the sample's tokens is not labelled: its term is 0.
    labelled = positions < logits.shape[1]
    positions = positions.clamp(max=logits.shape[1] - 1)
    if attention_mask is not None:
        padding = attention_mask.to(logits.device) == 0
        # Transformers lets the softmax run over padding, which makes the loss depend on the rest of the batch.
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        labelled = labelled & ~padding.gather(1, positions[:, None])[:, 0]
    return F.cross_entropy(logits, positions, reduction="none").where(labelled, 0.0)
