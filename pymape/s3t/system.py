"""An S3T system in a folder: data in slices, stages trained top-down, deletions that switch stages off for good."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pymape.data.records import listed
from pymape.s3t.adapters import SlicedAdapters
from pymape.s3t.config import Combination, EngineName, S3TConfig, check_config
from pymape.s3t.engines import Engine
from pymape.s3t.ensemble import Ensemble
from pymape.s3t.export import export_ensemble
from pymape.s3t.frozen_base import base_hash, load_base
from pymape.s3t.ledger import Ledger
from pymape.s3t.ledger.requests import check_request
from pymape.s3t.ledger.verify import FOREIGN
from pymape.s3t.ledger_training import other_options, replay_stage, train_planned
from pymape.s3t.names import RecordNames
from pymape.s3t.rows import model_fields
from pymape.s3t.sequences import choose_sequences
from pymape.s3t.served import ServedStages, read_served, require_served
from pymape.s3t.settings import placed, read_settings, settings_of
from pymape.s3t.theory import forecast

__all__ = ["S3T", "not_finished"]


class S3T:
    """A data set, the stages trained on it and the requests to delete from it, kept in one folder.

    One process writes at a time. A crash at any point leaves the state before an operation or after it; what a request
    left to do is finished when the folder is opened next. Deletions are accepted while `train` runs in another thread.

    Args:
        folder: the system's folder; `S3T.create` makes one.
        read_only: look only: takes no lock and finishes nothing.
        accept_lost_anchor: as `Ledger`.

    Raises:
        ValueError: no system there, another process writing it, or a file that is missing or damaged.

    Example:
        with S3T.create("system", S3TConfig("my-model", shards=3, slices=4)) as system:
            system.ingest(records)  # dicts as you would train on, each with an id
            system.train(workers=2)
            receipt = system.delete(["17", "204"], request_id="2026-001")
            model = system.ensemble()  # what is left, as one model

    Source: S3T (arXiv 2406.16257); docs/s3t.md says what is exact and what is not.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, read_only: bool = False, accept_lost_anchor: bool = False
    ) -> None:
        self._open(Ledger(folder, "read" if read_only else "write", accept_lost_anchor=accept_lost_anchor))

    def _open(self, ledger: Ledger) -> None:
        self.folder, self._ledger = Path(ledger.folder), ledger
        try:
            self.config, normal = read_settings(ledger.settings, self.folder)
        except (KeyError, TypeError) as error:
            ledger.close()
            raise ValueError(
                f"folder must hold a system with the options that this pymape knows, got {str(self.folder)!r}: {error}"
            ) from error
        self._names = RecordNames(ledger, self.config, normal)

    @classmethod
    def create(cls, folder: str | os.PathLike[str], config: S3TConfig, *, key: bytes | None = None) -> S3T:
        """Make a system; the options, the base model's hash and the sequences are fixed from here on.

        Args:
            folder: a new or empty folder.
            config: its options.
            key: 32 secret bytes that decide where records belong; default: drawn at random, as it should be. Give some
                only to repeat an experiment.

        Raises:
            ValueError: an option out of range, a base model that cannot be used, or a folder in use.
        """
        check_config(config)
        model = placed(config.model, folder)
        base = load_base(config.model, config.labels)
        digest = base_hash(base)
        size = SlicedAdapters(base, config).layers_per_slice  # refuses what cannot be trained
        budget = math.comb(config.slices, config.slices // 2) if config.sequences is None else config.sequences
        sequences = choose_sequences(config.method, config.slices, budget, prior=config.prior, seed=config.seed)
        config = dataclasses.replace(config, model=model, sequences=len(sequences), layers_per_slice=size)
        ledger = Ledger.create(folder, settings_of(config), digest, [sequences] * config.shards, key)
        system = cls.__new__(cls)
        system._open(ledger)
        return system

    def __enter__(self) -> S3T:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write the system."""
        self._ledger.close()

    def ingest(self, records: Iterable[Mapping[str, Any]], *, progress: bool | None = None) -> dict[str, int]:
        """Add records, each to the slice that a keyed hash of its id names.

        Args:
            records: dicts as the model is trained on (input_ids, labels, ... or pixel_values, labels), each with a
                unique `id` and optionally a `subject`, the person it is about: one subject's records share a slice.
                Both are texts or numbers; 7, 7.0 and " 7" are one, and so are Unicode's ways of writing one text.
            progress: show a progress bar; default: on a terminal.

        Returns:
            Number of records "added" and of those "already there" (ingesting the same data twice is harmless).

        Raises:
            ValueError: a record without an id, an id repeated, deleted or known with another content, a record that the
                model cannot be trained on, or stages trained already. Nothing is added then.
        """
        rows = self._names.rows(
            tqdm(records, desc="ingest", unit="record", disable=None if progress is None else not progress)
        )
        added, there = self._ledger.add_records(rows)
        return {"added": added, "already_there": there}

    def train(
        self,
        *,
        engine: EngineName | Engine = "local",
        workers: int | None = None,
        address: str | None = None,
        cache: bool = True,
        progress: bool | None = None,
    ) -> dict[str, Any]:
        """Train every stage that has never been planned or not been trained yet; `repair` those that are switched off.

        Args:
            engine: "local" (worker processes), "inline" (this process), "ray", or an engine of your own.
            workers: stages trained at the same time; default: as many as there are CPUs, or GPUs.
            address: of the Ray cluster; default: one started for this training.
            cache: keep hidden states of the frozen layers below a stage in the system's folder, for later stages and
                repairs (same bits, less time). Under Ray only with an engine of your own that says that its nodes share
                the folder.
            progress: show a progress bar; default: on a terminal.

        Returns:
            Number of stages "trained", of those "discarded" because a request deleted their records meanwhile, and of
            those that stay "switched_off" by requests.

        Raises:
            ValueError: a slice without records, a base model that has changed, or a stage whose training failed; all
                that finished before is kept.
        """
        empty = [(m, s) for m, row in enumerate(self._ledger.counts()) for s, n in enumerate(row) if n == 0]
        if empty and not self._ledger.deleted:
            raise ValueError(
                f"records must fill every slice, got none in slice {empty[0][1]} of shard {empty[0][0]} "
                f"({len(empty)} of {self.config.shards * self.config.slices} are empty): use fewer shards or slices"
            )
        return train_planned(self._ledger, self.config, self._ledger.plan, engine, workers, address, cache, progress)

    def repair(
        self,
        *,
        engine: EngineName | Engine = "local",
        workers: int | None = None,
        address: str | None = None,
        cache: bool = True,
        progress: bool | None = None,
    ) -> dict[str, Any]:
        """Train what deletions have switched off anew, as a new generation, on the records that are left.

        Args and Returns: as `train`.

        Raises:
            ValueError: as `train`, or every record is deleted.
        """
        if self._ledger.deleted and not any(map(any, self._ledger.counts())):
            raise ValueError("the system cannot be repaired: every record is deleted")
        return train_planned(self._ledger, self.config, self._ledger.repair, engine, workers, address, cache, progress)

    def plan(self, ids: Sequence[str] = (), *, subjects: Sequence[str] = ()) -> dict[str, Any]:
        """What `delete` would do, without doing it.

        Returns:
            Affected shards and stages, depth of each affected shard before and after, bytes to erase.

        Raises:
            ValueError: as `delete`.
        """
        return self._ledger.plan_deletion(self._names.wanted(ids, subjects)[0])

    def delete(
        self, ids: Sequence[str] = (), request_id: str = "", *, subjects: Sequence[str] = (), finish: bool = True
    ) -> dict[str, Any]:
        """Delete records: durably switch off, then erase, everything that was trained on them.

        Args:
            ids: of the records.
            request_id: the caller's name of the request; the same name with the same records, or with the same ids and
                subjects, gives the same receipt.
            subjects: people (or other subjects) all of whose records are deleted too.
            finish: erase before returning. False returns as soon as the request is durable and the stages are out of
                service; `finish` or the next opening does the rest.

        Returns:
            The receipt. Its "revoked" names files of exports that were "changed" and left, or are "missing".

        Raises:
            ValueError: an id that is unknown, repeated or deleted already, or a request id used for other records:
                nothing changes then. Or what keeps the request from its end, once it is accepted (`finish`).
            OSError: the disk is full and nothing has changed, or as before. `receipt` tells which.

        Warns:
            UserWarning: another request could not be finished.
        """
        check_request(request_id)
        names, asked = self._names.wanted(ids, subjects, request_id)
        return self._accept([(request_id, names)], finish, {request_id: asked} if asked else None)[0]

    def delete_batch(self, requests: Mapping[str, Sequence[str]], *, finish: bool = True) -> list[dict[str, Any]]:
        """Accept several requests in one durable step: all of them or none.

        Args:
            requests: request id -> ids of the records.
            finish: as `delete`.

        Returns:
            The receipts, in order.

        Raises:
            ValueError: as `delete`.
        """
        accepted: list[tuple[str, list[str]]] = []
        by: dict[str, str] = {}
        for request, given in requests.items():
            check_request(request)
            ids = listed(given, "ids")
            accepted.append((request, self._names.wanted(ids, (), request)[0]))
            for name, identifier in zip(accepted[-1][1], ids, strict=True):
                if by.setdefault(name, request) != request:
                    raise ValueError(
                        f"ids must not be in two requests, got {identifier!r} in {by[name]!r} and {request!r}"
                    )
        return self._accept(accepted, finish)

    def finish(self, *, check: bool = True) -> dict[str | None, Exception]:
        """Take every accepted request through switching, erasure and verification; one that cannot holds up no other.

        Args:
            check: raise the first problem. False returns all of them.

        Returns:
            What keeps each request from its end, by name; under None what keeps a damaged stage from being erased.

        Raises:
            ValueError: a stage that was not made from what is left, or a database that another process keeps reading.
            OSError: a file, also one of an export, cannot be erased. Calling again continues.
        """
        return self._ledger.finish(check=check)

    def missing_exports(self) -> list[str]:
        """A sentence for every export that a later deletion may have to revoke, and of which no file is there now."""
        return self._ledger.missing_exports()

    def receipt(self, request_id: str) -> dict[str, Any]:
        """The receipt of a request, in its present state.

        Raises:
            ValueError: no such request.
        """
        return self._ledger.receipt(request_id)

    def status(self) -> dict[str, Any]:
        """Records, stages, depth of every shard and requests, as JSON-able figures of one moment."""
        with self._ledger.snapshot():
            serving, counts = self._ledger.serving(), self._ledger.counts()
            untrained = self._ledger.untrained()
            return {
                "folder": str(self.folder),
                "model": self.config.model,
                "layers_per_slice": self.config.layers_per_slice,
                "slices": self.config.slices,
                "sequences": [list(sequence) for sequence in self._ledger.sequences[0]],
                "stages": self._ledger.stage_counts(),
                "requests": dict(Counter(request["state"] for request in self._ledger.requests())),
                "shards": [
                    {
                        "shard": shard,
                        "records": sum(counts[shard]),
                        "records_by_slice": counts[shard],
                        "depth": len(chain),
                        "serving": list(chain[-1].key.prefix) if chain else [],
                        "state": "served" if chain else "not trained" if shard in untrained else "dead",
                        "generation": self._ledger.generation(shard),
                    }
                    for shard, chain in enumerate(serving)
                ],
            }

    def forecast(self, rate: float | None = None, **options: Any) -> dict[str, Any]:
        """How many more records can be deleted before a shard is dead, and before all are, from the system's ledger.

        Args:
            rate: records deleted a day; default: the observed rate, where at least two requests were made.
            options: of `pymape.s3t.theory.forecast`.

        Returns:
            As `pymape.s3t.theory.forecast`.

        Raises:
            ValueError: as `pymape.s3t.theory.forecast`.
        """
        with self._ledger.snapshot():
            rate = self._ledger.deletion_rate() if rate is None else rate
            prefixes, counts = self._ledger.live_prefixes(), self._ledger.counts()
        return forecast(prefixes, counts, rate=rate, **options)

    def verify(self, *, replay: bool = False, receipts: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Check everything that can be checked.

        Audit chain, database, checksum and provenance of every stage file, agreement of provenance with the records
        that are left and with the system's options, absence of deleted records and of files that nothing refers to.
        A system that is open for writing has removed what a crash left: to see it too, open the folder read-only.

        Args:
            replay: also train one served stage again and compare bit by bit.
            receipts: what `delete` or `receipt` gave, kept outside the folder. Without one, nothing tells an older copy
                of the whole folder that was put back.

        Returns:
            {"ok": bool, "problems": [sentences], "checked": {...}, "unfinished": [sentences: what `finish` has to do]}.

        Raises:
            ValueError: something that is no receipt.
        """
        report = self._ledger.verify(receipts)
        try:
            report["problems"] += other_options(self._ledger, self.config)
        except (ValueError, *FOREIGN) as error:  # of a damaged database, which is among the problems as a rule
            report["problems"] = report["problems"] or [f"the options of stages cannot be checked: {error}"]
        if replay:
            try:
                report["checked"]["replayed"], problem = replay_stage(self._ledger, self.config)
            except (ValueError, OSError) as error:
                report["checked"]["replayed"], problem = None, f"no stage can be trained again: {error}"
            report["problems"] += [problem] if problem else []
        report["ok"] = not report["problems"]
        return report

    def chains(self) -> dict[int, list[dict[str, Any]]]:
        """Tensors of the served stages of every live shard, root first; damaged or tombstoned ones are refused."""
        return read_served(self._ledger).chains

    def ensemble(self, combination: Combination = "mean") -> Ensemble:
        """The live shards as one model, which follows the system: no call is answered with a tombstoned stage.

        Before every answer it asks the ledger, also after the system was closed, whether other stages are served by
        now, and loads them. With every shard dead a call raises `ValueError`. Erased weights stay in memory until then.

        Args:
            combination: "mean" of logits (of token probabilities for language models), "vote", or "size": mean weighted
                by the records that a shard's served stages were trained on.

        Raises:
            ValueError: nothing is trained or every shard is dead, or a stage file is damaged.
        """
        base = load_base(self.config.model, self.config.labels, self._ledger.base)
        source = ServedStages(self.folder)
        served = source.read()
        return Ensemble(base, self.config, served.chains, combination=combination, sizes=served.sizes, source=source)

    def evaluate(
        self, records: Sequence[Mapping[str, Any]], *, combination: Combination = "mean", batch_size: int = 32
    ) -> dict[str, Any]:
        """Accuracy of the ensemble and of every live shard on records that are in no slice.

        It runs where the stages are trained, on the CPU where that is a GPU that is not there.

        Args:
            records: as for `ingest`; ids are optional, subjects are not looked at.
            combination: as `ensemble`.
            batch_size: records per forward pass.
        """
        model = self.ensemble(combination)
        if self.config.stage.device == "cuda" and torch.cuda.is_available():
            model.to("cuda")
        scores = model.score([model_fields(record) for record in records], batch_size=batch_size)
        return {"records": len(records), "combination": combination, "live_shards": list(model.shards), **scores}

    def export(self, folder: str | os.PathLike[str], *, combination: Combination = "mean") -> list[dict[str, str]]:
        """Write what is served as PEFT adapters that load without pymape; a later deletion revokes them.

        Args:
            folder: a new or empty folder.
            combination: as `ensemble`; the index and the README of the export say how.

        Returns:
            One {"file", "sha256"} for every file, as `export_ensemble`.

        Raises:
            ValueError: nothing is trained or every shard is dead, a damaged stage file, a request that ends a stage
                meanwhile, or a folder that has files or cannot be written. Nothing is left there then.
        """
        target = Path(folder).resolve()  # once: a link on the way may be another one later
        served = require_served(self._ledger)
        return export_ensemble(
            target,
            self.config,
            served.chains,
            sha256=self._ledger.base,
            combination=combination,
            sizes=served.sizes,
            begin=lambda temporary: self._ledger.exporting(temporary, served.stages),
            place=lambda files: self._ledger.placing(target, files, served.stages),
        )

    def _accept(
        self, requests: Sequence[tuple[str, list[str]]], finish: bool, asked: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """The receipts of requests, each with the keyed names of its records; `asked` as `Ledger.tombstone`."""
        receipts = self._ledger.tombstone(requests, asked)
        if not finish:
            self._ledger.move_anchor()
        else:
            problems = self.finish(check=False)
            own = [problems.pop(request) for request, _ in requests if request in problems]
            for request, problem in problems.items():
                warnings.warn(not_finished(request, problem), stacklevel=3)
            if own:
                raise own[0]
            receipts = [self._ledger.receipt(request) for request, _ in requests]
        return receipts


def not_finished(request: str | None, problem: Exception) -> str:
    """A sentence about a problem that `S3T.finish` returns."""
    what = "a damaged stage is not erased" if request is None else f"request {request!r} is not finished"
    return f"{what}: {problem}"
