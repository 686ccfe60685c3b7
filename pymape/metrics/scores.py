"""What a model says about every record, kept so that any metric can be computed again without the model."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pymape.data.batching import RecordBatches
from pymape.errors import NotFinite
from pymape.forward import eval_mode, on_device, unlabelled
from pymape.losses import CLASSIFICATION, LOGITS_AT_A_TIME, QUESTION_ANSWERING, check_labels, per_sample_loss, task_of
from pymape.metrics.classification import Predictions
from pymape.metrics.forward import model_batches, task_logits
from pymape.storage.files import atomic_write

__all__ = ["RecordScores", "gradient_norms", "read_rows", "record_scores", "write_rows"]


_FORMAT = "pymape.scores.1"
_TERMS = ("log_probs", "means", "stds", "predicted", "labels")
_OPTIONAL = ("logits", "gradient_norms", "text_bytes")


@dataclass(frozen=True, eq=False)
class RecordScores:
    """Scores of N records under one model.

    A record has one or more terms: its class, its start and end position (question answering), or each of its labelled
    tokens. Term values are flat [T]; those of record n are at offsets[n] to offsets[n + 1].

    Attributes:
        ids: [N] unique ids.
        task: as `losses.task_of` names it.
        offsets: [N + 1] int64, rising from 0 to T.
        log_probs: [T] fp64, log p(label), in nats.
        means: [T] fp64, mean of log p over what could have been predicted instead, sum_v p_v log p_v.
        stds: [T] fp64, standard deviation of the same.
        predicted: [T] int64, the likeliest class, position or token.
        labels: [T] int64, the true one.
        logits: [N, C] of classifiers; None for other tasks.
        gradient_norms: [N] fp64, see `gradient_norms`; None if not asked for.
        text_bytes: [N] int64, length of the labelled text under zlib; None if not asked for.
    """

    ids: list[str]
    task: str
    offsets: Tensor
    log_probs: Tensor
    means: Tensor
    stds: Tensor
    predicted: Tensor
    labels: Tensor
    logits: Tensor | None = None
    gradient_norms: Tensor | None = None
    text_bytes: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("scores must be of at least one record, got none")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError(f"ids must be unique, got {len(self.ids) - len(set(self.ids))} repetitions")
        if self.offsets.shape != (len(self.ids) + 1,) or self.offsets[0] != 0 or (self.counts < 1).any():
            raise ValueError(f"offsets must rise from 0 in {len(self.ids)} steps, got {self.offsets.tolist()[:5]}...")
        lengths = {name: len(getattr(self, name)) for name in _TERMS}
        if set(lengths.values()) != {int(self.offsets[-1])}:
            raise ValueError(f"terms must be {int(self.offsets[-1])} of each kind, got {lengths}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counts(self) -> Tensor:
        """[N] int64, number of terms of each record."""
        return self.offsets.diff()

    @property
    def loss(self) -> Tensor:
        """[N] fp64, mean of -log p(label) over a record's terms, as `losses.per_sample_loss` has it."""
        return -self.mean_of(self.log_probs)

    @property
    def probability(self) -> Tensor:
        """[N] fp64, exp(-loss): geometric mean of p(label) over a record's terms."""
        return (-self.loss).exp()

    @property
    def correct(self) -> Tensor:
        """[N] fp64: 1 where the class, or both positions, are right; for token tasks the share of right tokens."""
        share = self.mean_of(self.predicted == self.labels)
        return share.floor() if self.task == QUESTION_ANSWERING else share

    def predictions(self) -> Predictions:
        """The same, reduced to what `summarise` needs."""
        return Predictions(self.correct, self.probability, self.loss)

    def mean_of(self, terms: Tensor) -> Tensor:
        """[N] fp64, mean of [T] values over the terms of each record."""
        rows = torch.repeat_interleave(self.counts)
        return torch.zeros(len(self), dtype=torch.float64).index_add_(0, rows, terms.double()) / self.counts

    def by_record(self, terms: Tensor) -> tuple[Tensor, ...]:
        """N views of [T] values, one per record."""
        return terms.split(self.counts.tolist())

    def require_same_records(self, other: RecordScores, argument: str) -> None:
        """Refuse scores of other records, or of the same ones in another order.

        Raises:
            ValueError: naming the argument that they were given as.
        """
        if self.ids != other.ids:
            raise ValueError(f"{argument} must be of the same {len(self)} records in the same order, got others")

    def select(self, ids: Sequence[str]) -> RecordScores:
        """The scores of these records, in the order given.

        Raises:
            ValueError: no id, one that is not here, or one given twice.
        """
        places = {name: row for row, name in enumerate(self.ids)}
        missing = [name for name in ids if name not in places]
        if missing:
            raise ValueError(f"ids must be among the {len(self)} records, got {missing[:3]}")
        if not ids:
            raise ValueError("ids must name at least one record, got none")
        rows = [places[name] for name in ids]
        own = self.by_record(torch.arange(len(self.labels)))
        terms = torch.cat([own[row] for row in rows])
        changes = {name: getattr(self, name)[terms] for name in _TERMS}
        changes |= {name: value[rows] for name, value in self._optional().items()}
        return dataclasses.replace(self, ids=list(ids), offsets=_offsets(self.counts[rows]), **changes)

    def without_final(self, token: int | None) -> RecordScores:
        """The same without each record's last token where it is `token` (the end of the text) and not the only one."""
        last = self.offsets[1:] - 1
        dropped = (self.labels[last] == (-1 if token is None else token)) & (self.counts > 1)
        keep = torch.ones(len(self.labels), dtype=torch.bool)
        keep[last[dropped]] = False
        changes = {name: getattr(self, name)[keep] for name in _TERMS}
        return dataclasses.replace(self, offsets=_offsets(self.counts - dropped.long()), **changes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as one safetensors file, in one step."""
        terms = {name: getattr(self, name) for name in ("offsets", *_TERMS)}
        write_rows(path, _FORMAT, self.ids, terms | self._optional(), task=self.task)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RecordScores:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is truncated, corrupt or of another kind.
        """
        ids, tensors, metadata = read_rows(path, _FORMAT)
        try:
            return cls(ids, metadata["task"], **tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path must be an intact file of scores, got {os.fspath(path)}: {error}") from error

    def _optional(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _OPTIONAL if getattr(self, name) is not None}


def record_scores(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 32,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    gradients: bool = False,
    decode: Callable[[list[int]], str] | None = None,
    progress: bool | None = None,
) -> RecordScores:
    """Run a model over a data set in eval mode and keep what metrics are made of.

    Padding has no part in it, and how records are batched changes no score beyond rounding.

    Args:
        model: Hugging Face model with a task head, where it is to run; its training flags are put back.
        data: map-style data set of dicts with the model's inputs and `labels` (for question answering
            `start_positions` and `end_positions`), or a DataLoader over one. An `id` field names the records.
        batch_size: records per forward pass.
        collate_fn: list of records without `id` -> dict of tensors; default pads on the right.
        gradients: also find `gradient_norms`, one backward pass per record.
        decode: token ids -> text, for `text_bytes`.
        progress: show a progress bar; default only on a terminal.

    Returns:
        Scores on the CPU, in the order of `data`.

    Raises:
        ValueError: empty data, repeated ids, labels missing or out of range, a task that predicts no classes, or a
            log-probability that is NaN or infinite.
    """
    task = task_of(model)
    batches = model_batches(model, data, batch_size, collate_fn)
    count = len(batches.positions)
    names = [""] * count
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    bar = tqdm(total=count, desc="scores", unit="record", disable=None if progress is None else not progress)
    with torch.no_grad(), eval_mode(model), bar:
        for rows, own, batch in batches:
            for row, name, scores in zip(rows.tolist(), own, _score(model, task, batch, own), strict=True):
                names[row], found[row] = name, scores
            bar.update(len(own))
    terms = {name: torch.cat([scores[name] for scores in found]) for name in _TERMS}
    counts = torch.tensor([len(scores["labels"]) for scores in found])
    text_bytes = None
    if decode is not None:
        texts = [decode(labels.tolist()) for labels in terms["labels"].split(counts.tolist())]
        text_bytes = torch.tensor([len(zlib.compress(text.encode())) for text in texts])
    return RecordScores(
        names,
        task,
        _offsets(counts),
        **terms,
        logits=torch.stack([scores["logits"] for scores in found]) if task == CLASSIFICATION else None,
        gradient_norms=_gradient_norms(model, batches) if gradients else None,
        text_bytes=text_bytes,
    )


def gradient_norms(model: nn.Module, data: Any, *, collate_fn: Callable[[list[Any]], Any] | None = None) -> Tensor:
    """Mean over the trainable parameter tensors of the L2 norm of the gradient of a record's own loss.

    Args:
        model: Hugging Face model with a task head; it runs in eval mode, and gradients it holds are left alone.
        data: as for `record_scores`.
        collate_fn: list of records without `id` -> dict of tensors.

    Returns:
        [N] fp64 in the order of `data`.

    Raises:
        ValueError: empty data, or a model without trainable parameters.

    Source:
        Wang et al. 2024, arXiv 2402.17012; the mean over tensors is that of open-unlearning's mia_gradnorm.
    """
    return _gradient_norms(model, model_batches(model, data, 1, collate_fn))


def _gradient_norms(model: nn.Module, batches: RecordBatches) -> Tensor:
    """The norms of the records of batches, however these divide them."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("model must have trainable parameters for gradient norms, got none")
    with torch.inference_mode(False), torch.enable_grad(), eval_mode(model):
        norms = torch.empty(len(batches.positions), dtype=torch.float64)
        for row in range(len(norms)):
            inputs = on_device(model, batches.alone(row))
            loss = per_sample_loss(model, inputs, model(**unlabelled(inputs))).sum()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            reached = [torch.linalg.vector_norm(gradient.float()) for gradient in found if gradient is not None]
            norms[row] = torch.stack(reached).double().mean().cpu()
    return norms


def write_rows(
    path: str | os.PathLike[str], kind: str, ids: Sequence[str], tensors: Mapping[str, Tensor], **metadata: str
) -> None:
    """Write tensors of records with their ids as one safetensors file, in one step; `kind` names its format."""
    from safetensors.torch import save_file

    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(content, temporary, {"format": kind, "ids": json.dumps(list(ids)), **metadata})


def read_rows(path: str | os.PathLike[str], kind: str) -> tuple[list[str], dict[str, Tensor], dict[str, str]]:
    """Ids, tensors and metadata of a file that `write_rows` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is truncated, corrupt or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise ValueError(f"format is {metadata.get('format')!r}, not {kind!r}")
            names = file.keys()
            return json.loads(metadata["ids"]), {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"path must be an intact {kind} file, got {os.fspath(path)}: {error}") from error


def _score(model: nn.Module, task: str, batch: Mapping[str, Any], ids: Sequence[str]) -> list[dict[str, Tensor]]:
    """Term values of each record of a batch, and its logits where it has one term."""
    check_labels(model, batch, ids)
    inputs = on_device(model, batch)
    logits, labels, counts = task_logits(task, inputs, model(**unlabelled(inputs)))
    columns = {name: values.cpu().split(counts) for name, values in _statistics(logits, labels).items()}
    bad = [name for name, values in zip(ids, columns["log_probs"], strict=True) if not values.isfinite().all()]
    if bad:
        raise NotFinite(f"log-probabilities must be finite, got NaN or infinity for ids {bad[:3]}")
    if task == CLASSIFICATION:
        columns["logits"] = logits.cpu().unbind()
    return [{name: values[row] for name, values in columns.items()} for row in range(len(ids))]


def _statistics(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`RecordScores`' term values from logits [n, V] and labels [n], a part at a time: V may be a whole vocabulary."""
    rows = max(1, LOGITS_AT_A_TIME // logits.shape[1])
    parts = []
    for part, wanted in zip(logits.split(rows), labels.split(rows), strict=True):
        log_p = part.to(torch.promote_types(part.dtype, torch.float32)).log_softmax(-1)
        p = log_p.exp()
        possible = log_p.masked_fill(p == 0, 0.0)  # 0 log 0 = 0
        mean = (p * possible).sum(-1)
        std = (p * (possible - mean[:, None]).square()).sum(-1).sqrt()
        log_prob = log_p.gather(-1, wanted[:, None]).squeeze(-1)
        parts.append((log_prob.double(), mean.double(), std.double(), part.argmax(-1), wanted))
    return dict(zip(_TERMS, map(torch.cat, zip(*parts, strict=True)), strict=True))


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
