"""What objectives need of the original model, kept on disk record by record."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pymape.model_layout import config_text
from pymape.storage.files import atomic_write
from pymape.storage.tensors import tensor_bytes

__all__ = ["ReferenceCache", "record_digest", "stack_rows", "weights_digest"]

_logger = logging.getLogger(__name__)
_FORMAT = "pymape reference 3"  # 1 counted tokens of padding, 2 did not see the collator


class ReferenceCache:
    """A folder of reference values: one safetensors file for every model and kind of value, one row for every record.

    A file is found by the digest of the model's weights, a row by that of the record as the model is given it, so that
    values of other weights, or of a record or collator that has changed since, are never used; further data sets of the
    same model add rows. A file that is damaged is written anew. Deleting files, or the folder, costs their
    recomputation only.

    Args:
        folder: where; created when absent.
        model_digest: what the values depend on besides the records: the weights, and for instance the precision.
    """

    def __init__(self, folder: str | os.PathLike[str], model_digest: str) -> None:
        self.folder = Path(folder)
        self.model_digest = model_digest

    def path(self, kind: str) -> Path:
        """The file of one kind of value."""
        return self.folder / f"{kind}-{self.model_digest[:32]}.safetensors"

    def values(
        self, kind: str, records: Sequence[bytes], compute: Callable[[list[int]], Tensor], *, write: bool = True
    ) -> Tensor:
        """[N, ...] values of the records, read where they are known and computed where not; see `stack_rows`.

        Args:
            kind: name of the value, for instance "nll".
            records: [N] digests of the records.
            compute: rows of `records` -> their values, on the CPU.
            write: whether to add what was computed to the file (one process of several does).
        """
        known = self._read(kind)
        missing = [row for row, record in enumerate(records) if record not in known]
        if missing:
            computed = compute(missing)
            known |= {records[row]: value for row, value in zip(missing, computed, strict=True)}
            if write:
                self._write(kind, known)
        return stack_rows([known[record] for record in records])

    def _read(self, kind: str) -> dict[bytes, Tensor]:
        path = self.path(kind)
        if not path.exists():
            return {}
        try:
            with safe_open(path, "pt") as file:
                found = file.metadata() or {}
                digests, values = file.get_tensor("records"), file.get_tensor("values")
        except (SafetensorError, OSError) as error:
            _logger.warning("%s cannot be read (%s) and is computed anew", path, error)
            return {}
        expected = {"format": _FORMAT, "model": self.model_digest, "sha256": _checksum(digests, values)}
        if found != expected:
            different = ", ".join(name for name in expected if found.get(name) != expected[name])
            _logger.warning("%s does not match its own record (%s) and is computed anew", path, different)
            return {}
        return {bytes(digest): value for digest, value in zip(digests.numpy(), values, strict=True)}

    def _write(self, kind: str, known: Mapping[bytes, Tensor]) -> None:
        digests = torch.from_numpy(np.frombuffer(b"".join(known), dtype=np.uint8).reshape(len(known), -1).copy())
        values = stack_rows(list(known.values()))
        metadata = {"format": _FORMAT, "model": self.model_digest, "sha256": _checksum(digests, values)}
        with atomic_write(self.path(kind)) as path:
            save_file({"records": digests, "values": values}, path, metadata)


def stack_rows(rows: Sequence[Tensor]) -> Tensor:
    """[N, ...] of one value for every record; rows of different lengths end in NaN."""
    if not rows[0].dim():
        return torch.stack(list(rows))
    return pad_sequence(list(rows), batch_first=True, padding_value=math.nan)


def weights_digest(model: nn.Module, *context: str) -> str:
    """sha256 over a model's class, configuration, weights and buffers (names, types, shapes, bytes), and `context`."""
    digest = hashlib.sha256("\n".join([type(model).__name__, *context, config_text(model)]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def record_digest(*inputs: Mapping[str, Any]) -> bytes:
    """sha256 over the names and values of a record's collated inputs, and of those of its alternative answer."""
    digest = hashlib.sha256()
    for one in inputs:
        digest.update(b"\ninputs")
        for name, value in sorted(one.items()):
            digest.update(f"\n{name} ".encode())
            _take_in(digest, value)
    return digest.digest()


def _take_in(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} values ".encode())
        for item in value:
            _take_in(digest, item)
    elif hasattr(value, "tobytes"):  # arrays and images, which repr shortens
        size = getattr(value, "shape", None) or getattr(value, "size", None)
        digest.update(f"{getattr(value, 'dtype', None) or getattr(value, 'mode', None)} {size} ".encode())
        digest.update(value.tobytes())
    else:
        digest.update(f"{value!r} ".encode())


def _checksum(digests: Tensor, values: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(digests.shape)} {values.dtype} {tuple(values.shape)}".encode())
    digest.update(tensor_bytes(digests))
    digest.update(tensor_bytes(values))
    return digest.hexdigest()
