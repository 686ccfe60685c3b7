"""Per-sample gradients of the head and filter masks, and the empirical Fisher information they give."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pymape.data.batching import RecordBatches
from pymape.data.records import check_unique, id_list, plain, sample_of
from pymape.forward import input_fields, padding_token
from pymape.gradient_pass import BatchScores, GradientPass, one_behind
from pymape.model_layout import ModelLayout, layout
from pymape.processes import exchange, rank, require_equal, share_rows, together, world_size
from pymape.storage.files import atomic_write

__all__ = ["Importance", "importance"]

FORMAT = "pymape.importance.1"
_STORED = (torch.float32, torch.bfloat16, torch.float64)
_CHUNK = 256  # samples raised to fp64 at a time


@dataclass(eq=False)
class Importance:
    """Per-sample gradients g_n = d loss_n / d m of a model's masks at m = 1.

    The empirical Fisher information is F = (1/N) sum_n g_n g_n^T; it is never formed, only its factors are kept.

    Args:
        heads: [N, L, H] gradients of the head gates (query heads), fp32, bf16 or fp64.
        filters: [N, L, F] gradients of the filter gates.
        ids: [N] ids of the records, all different.
        layout: the model's layout.
        provenance: JSON-able record of how the gradients came to be.

    Raises:
        ValueError: shapes that differ from the layout or from each other, or repeated ids.
    """

    heads: Tensor
    filters: Tensor
    ids: list[str]
    layout: ModelLayout
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("heads", "filters"):
            expected = (len(self.ids), self.layout.layers, getattr(self.layout, name))
            if tuple(getattr(self, name).shape) != expected:
                raise ValueError(f"{name} must have shape {expected}, got {tuple(getattr(self, name).shape)}")
        check_unique(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """sha256 over the ids in order: which records these gradients are of."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()

    @property
    def fisher_heads(self) -> Tensor:
        """Diagonal of the Fisher information of the head gates, (1/N) sum_n g_n^2: fp64 [L, H]."""
        return _mean(self.heads, 2)

    @property
    def fisher_filters(self) -> Tensor:
        """Diagonal of the Fisher information of the filter gates, (1/N) sum_n g_n^2: fp64 [L, F]."""
        return _mean(self.filters, 2)

    @property
    def grad_heads(self) -> Tensor:
        """Gradient of the mean loss with respect to the head gates: fp64 [L, H]."""
        return _mean(self.heads, 1)

    @property
    def grad_filters(self) -> Tensor:
        """Gradient of the mean loss with respect to the filter gates: fp64 [L, F]."""
        return _mean(self.filters, 1)

    def select(self, ids: Sequence[str]) -> Importance:
        """The rows of these records, in the order given.

        Raises:
            ValueError: an id that is not here, or is given twice.
        """
        ids = id_list(ids, "ids")
        places = {name: row for row, name in enumerate(self.ids)}
        missing = [name for name in ids if name not in places]
        if missing:
            raise ValueError(f"ids must be among the {len(self)} records, got {sample_of(missing)}")
        rows = torch.tensor([places[name] for name in ids], dtype=torch.long)
        return dataclasses.replace(
            self, heads=self.heads[rows], filters=self.filters[rows], ids=ids, provenance=dict(self.provenance)
        )

    def without(self, ids: Sequence[str]) -> Importance:
        """The rows of all other records, in their order.

        Raises:
            ValueError: an id that is not here.
        """
        left_out = set(id_list(ids, "ids"))
        missing = left_out.difference(self.ids)
        if missing:
            raise ValueError(f"ids must be among the {len(self)} records, got {sample_of(sorted(missing))}")
        return self.select([name for name in self.ids if name not in left_out])

    @classmethod
    def concat(cls, parts: Sequence[Importance]) -> Importance:
        """The rows of all parts, one after the other.

        Raises:
            ValueError: no parts, parts of different models, or an id in two of them.
        """
        if not parts:
            raise ValueError("parts must hold at least one Importance, got none")
        for part in parts:
            _check_same_model(parts[0].layout, part.layout)
        return cls(
            torch.cat([part.heads for part in parts]),
            torch.cat([part.filters for part in parts]),
            [name for part in parts for name in part.ids],
            parts[0].layout,
            dict(parts[0].provenance),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as one safetensors file, in one step."""
        from safetensors.torch import save_file

        metadata = {
            "format": FORMAT,
            "ids": json.dumps(self.ids),
            "layout": json.dumps(dataclasses.asdict(self.layout)),
            "provenance": json.dumps(self.provenance),
        }
        tensors = {"heads": self.heads.cpu().contiguous(), "filters": self.filters.cpu().contiguous()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module | ModelLayout | None = None, *, mmap: bool = True
    ) -> Importance:
        """Read what `save` wrote, and check that it fits `model` if one is given.

        Args:
            path: the file.
            model: the model (or its layout) that the gradients must be of.
            mmap: leave the gradients on disk until they are read, for files larger than memory; False copies them.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is truncated, corrupt or of another kind, or gradients of another model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"format is {metadata.get('format')!r}, not {FORMAT!r}")
                heads, filters = file.get_tensor("heads"), file.get_tensor("filters")
                loaded = cls(
                    heads if mmap else heads.clone(),
                    filters if mmap else filters.clone(),
                    json.loads(metadata["ids"]),
                    ModelLayout(**json.loads(metadata["layout"])),
                    json.loads(metadata["provenance"]),
                )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path must be an intact importance file, got {os.fspath(path)}: {error}") from error
        if model is not None:
            _check_same_model(loaded.layout, model if isinstance(model, ModelLayout) else layout(model))
        return loaded


def importance(
    model: nn.Module,
    data: Any,
    *,
    loss: Callable[[Any, Mapping[str, Tensor]], Tensor] | None = None,
    ids: Sequence[str] | None = None,
    batch_size: int = 32,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    bucket: bool = True,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    progress: bool | None = None,
    device: torch.device | str | None = None,
) -> Importance:
    """Gradients of every sample's own loss with respect to all head and filter masks, at m = 1.

    heads: g_n[l, h] = sum_t <O[n, t, l, h], d loss_n / d O[n, t, l, h]>, filters: g_n[l, f] = sum_t a[n, t, l, f] *
    d loss_n / d a[n, t, l, f], with O a head's output before W_O and a the activation of a filter. One forward and one
    backward per batch give the gradients of all its samples, because samples do not mix; weights get no gradient. The
    result does not depend on how records are batched or padded, unless the model itself does (rotary positions of type
    "longrope" or "dynamic"). Where `torch.distributed` runs, each process takes a share of the batches and all get the
    whole result; all must be given the same model and the same data, undivided.

    Args:
        model: Hugging Face model of a supported architecture. It runs in eval mode and is left as it was found.
        data: map-style data set of dicts with the model's inputs and `labels` (for question answering `start_positions`
            and `end_positions`), or a DataLoader over one. An `id` field names the records.
        loss: (model outputs, batch) -> [B] losses, in place of `per_sample_loss`; sample n's may depend on it alone.
        ids: [N] ids of the records of `data`; default their `id` fields, or their places "0", "1", ...
        batch_size: records per batch (a DataLoader brings its own).
        collate_fn: list of records without `id` -> dict of tensors; default pads `input_ids` and the like on the right.
        bucket: group records of similar length; changes the time, not the result.
        backend: of the masked operators, where the model is not instrumented yet.
        dtype: what the gradients are stored in: fp32, bf16 (half the memory) or fp64. They accumulate in at least fp32.
        autocast: run the model in this dtype, bf16 or fp16.
        progress: show a progress bar; default only on a terminal.
        device: where to run; the model is moved there and back. Default where the model is.

    Returns:
        Importance on the CPU, rows in the order of `data`.

    Raises:
        ValueError: empty data, repeated ids, labels missing or out of range, a loss that is NaN or infinite, an unknown
            architecture, data that differ between processes.

    Source: arXiv 2508.17233 (MAPE-Unlearn); Kwon et al. 2022, arXiv 2204.09656.
    """
    from pymape.modules import gates  # loads transformers

    if dtype not in _STORED:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float64, got {dtype}")
    shape = layout(model)
    with together():
        batches = RecordBatches(
            data,
            batch_size=batch_size,
            collate_fn=collate_fn,
            bucket=bucket,
            pad_token_id=padding_token(model),
            fields=input_fields(model) if loss is None else None,
            share=(rank(), world_size()),
        )
        require_equal((batches.positions, batches.shares), "data")
        count, taken = len(batches.positions), set[str]()
        names = [""] * count
        if ids is not None:
            if len(ids) != len(batches.data):
                raise ValueError(f"ids must name the {len(batches.data)} records of data, got {len(ids)} ids")
            names = [str(plain(ids[place])) for place in batches.positions]
            check_unique(names)
        hidden = True if rank() else None if progress is None else not progress
        bar = tqdm(total=count, desc="importance", unit="record", disable=hidden)
        with torch.inference_mode(False), torch.enable_grad(), prepared(model, backend, device), gates(model), bar:
            heads = torch.empty(count, shape.layers, shape.heads, dtype=dtype)
            filters = torch.empty(count, shape.layers, shape.filters, dtype=dtype)
            run = GradientPass(model, shape, loss, autocast, dtype)

            def started() -> Iterator[tuple[Tensor, BatchScores]]:
                for rows, own_names, batch in batches:
                    if ids is None:
                        check_unique(own_names, taken)
                        for row, name in zip(rows.tolist(), own_names, strict=True):
                            names[row] = name
                    yield rows, run(batch, [names[row] for row in rows.tolist()])

            for rows, scores in one_behind(started()):
                heads[rows], filters[rows] = scores.wait()
                bar.update(len(rows) * world_size())
    share_rows((heads, filters), batches.shares)
    for own, theirs in zip(batches.shares, exchange(names), strict=True):
        for row in own:
            names[row] = theirs[row]
    provenance = {
        "loss": "per_sample_loss" if loss is None else getattr(loss, "__qualname__", type(loss).__name__),
        "model": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
    }
    return Importance(heads, filters, names, shape, provenance)


@contextmanager
def prepared(model: nn.Module, backend: str, device: torch.device | str | None) -> Iterator[None]:
    """Instrument, freeze and set to eval mode; afterwards everything is as before, whatever happened."""
    from pymape.modules import instrument, is_instrumented, restore

    home = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    instrumented = is_instrumented(model)
    if not instrumented:
        instrument(model, backend=backend)
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        if device is not None:
            model.to(device)
        yield
    finally:
        if device is not None:
            model.to(home)
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
        if not instrumented:
            restore(model)


def _mean(gradients: Tensor, power: int) -> Tensor:
    if not len(gradients):
        raise ValueError("importance must hold at least one record, got none")
    total = torch.zeros(gradients.shape[1:], dtype=torch.float64, device=gradients.device)
    for chunk in gradients.split(_CHUNK):
        total += chunk.double().pow(power).sum(0)
    return total / len(gradients)


def _check_same_model(one: ModelLayout, other: ModelLayout) -> None:
    if one.fingerprint != other.fingerprint:
        raise ValueError(
            f"importance must be of one model, got {one.model_type} {one.fingerprint[:12]} "
            f"and {other.model_type} {other.fingerprint[:12]}"
        )
