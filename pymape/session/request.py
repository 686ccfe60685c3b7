"""What one request of a session computes: masks, new weights and the figures of both."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from transformers import set_seed

from pymape.checkpoint import load_model
from pymape.commands.encoding import Encoder
from pymape.commands.steps import Clock, Data, check_objective, fine_tune, judge, learn_masks, model_figures, unlearn
from pymape.config import UnlearnConfig
from pymape.data.tables import Records
from pymape.importance import Importance
from pymape.storage.runs import IMPORTANCE, MASKS, MODEL, quiet_transformers
from pymape.storage.store import file_hash

__all__ = ["meet", "start"]


def start(config: UnlearnConfig, records: Records, folder: Path) -> None:
    """Write the model that a session starts from, fine-tuned on all records if the options say so.

    Args:
        config: the session's options.
        records: all records.
        folder: where the model goes.
    """
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="pymape-") as scratch:
        set_seed(config.seed)
        model, tokenizer = load_model(config, records)
        encode = Encoder(config, model, tokenizer)
        rows = encode(records.columns, "data.path", records.ids)  # shows now whether the data fit the model
        check_objective(config, model, [])
        if config.train_first:
            fine_tune(model, rows, config.train, config.seed, encode.collate, scratch)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def meet(
    config: UnlearnConfig, last: Path, new: Path, records: Records, forget: Sequence[str], retain: Sequence[str]
) -> dict[str, Any]:
    """Unlearn records, from the model of the last step to that of a new one.

    Args:
        config: the request's options.
        last: folder of the last step: `model`, and `importance.safetensors` where there is one.
        new: folder that gets the same, and `masks.safetensors`.
        records: all records not forgotten yet.
        forget: ids of records to forget.
        retain: ids of records to keep.

    Returns:
        For the receipt: number of records, masks, why the unlearning ended early if it did, metrics before and after,
        wall and processor seconds by phase.
    """
    clock = Clock()
    config = dataclasses.replace(config, model=str(last / MODEL), train_first=False)
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="pymape-") as scratch:
        set_seed(config.seed)
        with clock.phase("load"):
            model, tokenizer = load_model(config, records)
            encode = Encoder(config, model, tokenizer)
            rows = {row["id"]: row for row in encode(records.columns, "data.path", records.ids)}
            data = Data([rows[name] for name in forget], [rows[name] for name in retain], *encode.others())
            check_objective(config, model, data.forget)
        with clock.phase("evaluate"):
            before = judge(model, data, config, encode.collate)
        stored = Importance.load(last / IMPORTANCE) if (last / IMPORTANCE).exists() else None
        masks, learned = learn_masks(config, model, data, encode.collate, clock, _rows(stored, set(retain)))
        others = _rows(stored, rows.keys() - set(forget) - set(learned.ids if learned else ()))
        kept = [part for part in (learned, others) if part is not None]
        with clock.phase("unlearn"):
            stopped = unlearn(config, model, data, masks, encode.collate, scratch)
        with clock.phase("evaluate"):
            after = judge(model, data, config, encode.collate)
        with clock.phase("save"):
            model.save_pretrained(new / MODEL)
            tokenizer.save_pretrained(new / MODEL)
            if kept:
                Importance.concat(kept).save(new / IMPORTANCE)
        described = None
        if masks is not None:
            if config.receipt_ids == "keyed":
                # A plain hash of few ids can be undone by trying ids.
                for side in ("forget", "retain"):
                    masks.provenance.get(side, {}).pop("fingerprint", None)
            masks.save(new / MASKS)
            described = {"file": MASKS, "sha256": file_hash(new / MASKS), "cost": masks.cost(), **masks.provenance}
        return {
            "records": {name: len(part) for name, part in data.sets.items()},
            "masks": described,
            "stopped": stopped,
            "metrics": model_figures({"before": before, "after": after}, config.seed),
            "seconds": clock.seconds,
            "cpu_seconds": clock.cpu_seconds,
        }


def _rows(stored: Importance | None, wanted: Set[str]) -> Importance | None:
    """The stored gradients of some records; None where there are none."""
    ids = [] if stored is None else [name for name in stored.ids if name in wanted]
    return stored.select(ids) if stored is not None and ids else None
