"""The main job on a user's own model and data: learn the masks, unlearn, judge, save."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from typing import Any

from transformers import (
    set_seed,
)

from pymape.checkpoint import load_model
from pymape.commands.encoding import Encoder
from pymape.commands.steps import Clock, Data, check_objective, fine_tune, judge, learn_masks, model_figures, unlearn
from pymape.commands.unlearn_page import summary_text, write_page
from pymape.config import UnlearnConfig, check_config
from pymape.data.tables import load_ids, load_records, split_forget
from pymape.metrics import measure_cost
from pymape.storage.runs import MASKS, MODEL, environment, quiet_transformers, run_folder, write_summary

__all__ = ["run_unlearn"]


def run_unlearn(config: UnlearnConfig) -> dict[str, Any]:
    """Unlearn, print a table and write the run's folder: model, masks, summary.json and report.html.

    Args:
        config: the run's options.

    Returns:
        What `summary.json` holds.

    Raises:
        ValueError: an option out of range, data that cannot be used, a loss that is no longer finite; nothing is left
            behind then.
        OSError: a model folder that cannot be read.
    """
    check_config(config)
    if config.data.forget is None:
        raise ValueError("data.forget must be a file of ids to forget, got none")
    clock = Clock()
    output = run_folder(config.output, "unlearn", _inputs(config))
    with output as folder, quiet_transformers(), tempfile.TemporaryDirectory(prefix="pymape-") as scratch:
        with measure_cost() as cost:
            source = load_records(config.data.path, config.data.id_column, argument="data.path")
            forget = load_ids(config.data.forget, config.data.id_column, argument="data.forget")
            retain = config.data.retain and load_ids(config.data.retain, config.data.id_column, argument="data.retain")
            split = split_forget(source.ids, forget, retain or None)
            set_seed(config.seed)
            model, tokenizer = load_model(config, source)
            encode = Encoder(config, model, tokenizer)
            records = encode(source.columns, "data.path", source.ids)
            parts = ([records[row] for row in rows] for rows in (split.forget, split.retain))
            data = Data(*parts, *encode.others())
            check_objective(config, model, data.forget)

            start = copy.deepcopy(model) if config.compare_retrain else None
            if config.train_first:
                with clock.phase("train"):
                    fine_tune(model, records, config.train, config.seed, encode.collate, scratch)
            models = {"original": judge(model, data, config, encode.collate)}
            masks, _ = learn_masks(config, model, data, encode.collate, clock)
            with clock.phase("unlearn"):
                stopped = unlearn(config, model, data, masks, encode.collate, scratch)
            models["unlearned"] = judge(model, data, config, encode.collate)
            model.save_pretrained(folder / MODEL)
            tokenizer.save_pretrained(folder / MODEL)
            if masks is not None:
                masks.save(folder / MASKS)
            if start is not None:
                with clock.phase("retrain"):
                    forgotten = set(split.forget)
                    rest = [record for row, record in enumerate(records) if row not in forgotten]
                    fine_tune(start, rest, config.train, config.seed, encode.collate, scratch)
                models["retrained"] = judge(start, data, config, encode.collate)

        summary = {
            **environment(),
            "kind": "unlearn",
            "task": encode.task,
            "config": dataclasses.asdict(config),
            "records": {name: len(rows) for name, rows in data.sets.items()},
            "data_fingerprint": source.fingerprint(),
            "models": model_figures(models, config.seed),
            "masks": None if masks is None else {"cost": masks.cost(), **masks.provenance},
            "stopped": stopped,
            "seconds": clock.seconds,
            "cpu_seconds": clock.cpu_seconds,
            "peak_memory_mib": cost.peak_cpu_mib if cost.peak_gpu_mib is None else cost.peak_gpu_mib,
        }
        write_page(folder / "report.html", summary, masks, models)
        write_summary(folder, summary)
    print(summary_text(summary))
    return summary


def _inputs(config: UnlearnConfig) -> list[str | None]:
    """Files and folders that a run reads."""
    data = config.data
    files = [data.path, data.forget, data.retain, data.test, data.unseen]
    return [config.model, *files, config.masks.file, config.prefix_cache]
