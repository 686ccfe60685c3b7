"""Successive unlearning requests on one model, kept in a folder that survives crashes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

from pymape.config import UnlearnConfig, check_config
from pymape.data.records import id_list
from pymape.data.tables import Records, load_ids, load_records, read_table, split_forget
from pymape.storage.runs import IMPORTANCE, MODEL, environment, write_summary
from pymape.storage.store import FIRST, STATE, FolderStore

__all__ = ["UnlearnSession", "run_request", "stored_options", "weights_hash"]

KIND, FORMAT = "session", "pymape.receipt.1"
_RECEIPT = "receipt.json"
# What belongs to one command, not to the session.
_NOT_STORED = ("session", "request_id", "output")
# Columns that the model sees, whose content is fixed when the session is created.
_COLUMNS = ("text_column", "text_pair_column", "label_column", "alternative_column")


class UnlearnSession:
    """Requests to forget records of one data set, met one after the other by one model.

    A request learns its masks (the retain importance of the first request is used again, without the rows of records
    forgotten since), unlearns from the weights that the last request left, never retains a record that any request
    forgot, and leaves a receipt. It happens as a whole or not at all, whatever kills the process; an unfinished one is
    rolled back when the session is opened next. Superseded weights are deleted: they know what has been forgotten.

    Args:
        folder: the session's folder; `UnlearnSession.create` makes one.
        read_only: look at receipts only: takes no lock, checks no weights and rolls nothing back.

    Raises:
        ValueError: no session there, another process writing it, or a file that is missing or damaged.

    Example:
        with UnlearnSession.create("session", UnlearnConfig("my-model", DataConfig("records.csv"))) as session:
            receipt = session.request("2026-001", ["17", "204"])
    """

    def __init__(self, folder: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self._open(FolderStore(folder, KIND, "read" if read_only else "write"))

    def _open(self, store: FolderStore) -> None:
        self._store = store
        try:
            self._key = store.read(f"{FIRST}/key")
            self.config: UnlearnConfig = _config_from(UnlearnConfig, store.content["config"])
        except BaseException:
            store.close()
            raise

    @classmethod
    def create(cls, folder: str | os.PathLike[str], config: UnlearnConfig) -> UnlearnSession:
        """Start a session from a model folder and a data set; with `train_first` the model is fine-tuned on it before.

        Args:
            folder: a new or empty folder.
            config: options of all requests that bring none of their own.

        Raises:
            ValueError: a folder in use, an option out of range, a model or data that cannot be used.
        """
        _check(config)
        from pymape.session.request import start  # loads transformers

        store = FolderStore(folder, KIND, "create")
        try:
            with store.step(FIRST) as step:
                key = secrets.token_bytes(32)
                records = load_records(config.data.path, config.data.id_column, argument="data.path")
                options = dataclasses.replace(config, data=dataclasses.replace(config.data, forget=None))
                step.content = {
                    "config": {k: v for k, v in dataclasses.asdict(options).items() if k not in _NOT_STORED},
                    "created": _now(),
                    "requests": [],
                }
                (step.folder / "key").write_bytes(key)
                (step.folder / "key").chmod(0o600)
                known = dict(zip(_names(key, records.ids), _digests(key, config, records), strict=True))
                (step.folder / "records.json").write_text(json.dumps(known), encoding="utf-8")
                start(config, records, step.folder / MODEL)
        except BaseException:
            store.close()
            raise
        session = cls.__new__(cls)
        session._open(store)
        return session

    def __enter__(self) -> UnlearnSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write the session."""
        self._store.close()

    @property
    def model_folder(self) -> Path:
        """Hugging Face model folder of the current weights; the next request replaces it."""
        return self._store.path(f"step-{len(self._store.content['requests']):04d}/{MODEL}")

    @property
    def receipts(self) -> list[dict[str, Any]]:
        """Receipts of all finished requests, in order."""
        return [self._receipt(number) for number in range(1, len(self._store.content["requests"]) + 1)]

    def forgotten_by(self, identifier: str) -> str | None:
        """The request that forgot a record; None where none did."""
        name = _names(self._key, [identifier])[0]
        return next((entry["id"] for entry in self._store.content["requests"] if name in entry["forgotten"]), None)

    def verify(self) -> None:
        """Check every file of the session against its sha256.

        Raises:
            ValueError: naming the first file that is missing or changed.
        """
        self._store.verify()

    def request(self, request_id: str, forget: Sequence[str], config: UnlearnConfig | None = None) -> dict[str, Any]:
        """Forget records, unless this request is finished already: then only its receipt is returned.

        Args:
            request_id: the caller's name of the request.
            forget: ids of the records to forget.
            config: options of this request; default those the session was created with. It continues from the
                session's own weights; `data.forget` is not read. The columns are the session's, and the alternative
                column too where the session has one.

        Returns:
            The receipt.

        Raises:
            ValueError: an id that is unknown, repeated or forgotten by an earlier request, a finished request of this
                name with other ids, data that has changed, a loss that is no longer finite. The session is unchanged.
        """
        if not request_id or not request_id.isprintable():
            raise ValueError(f"request_id must be a printable, non-empty string, got {request_id!r}")
        forget = id_list(forget, "forget")
        if not forget:
            raise ValueError("forget must name at least one record, got an empty forget set")
        names = _names(self._key, forget)
        for number, entry in enumerate(self._store.content["requests"], start=1):
            if entry["id"] != request_id:
                continue
            if set(entry["forgotten"]) != set(names):
                raise ValueError(f"request_id must be new for other records, got {request_id!r}, a finished request")
            return self._receipt(number)
        config = self.config if config is None else config
        _check(config)
        if config.model != self.config.model:
            raise ValueError(f"model must be the session's, {self.config.model!r}, got {config.model!r}")
        for name in _COLUMNS:
            own, asked = getattr(self.config.data, name), getattr(config.data, name)
            if asked != own and (own is not None or name != "alternative_column"):
                raise ValueError(f"data.{name} must be the session's, {own!r}, got {asked!r}")
        records, retain = self._records(forget, config)
        from pymape.session.request import meet  # loads transformers

        number = len(self._store.content["requests"]) + 1
        last, name = f"step-{number - 1:04d}", f"step-{number:04d}"
        started = _now()
        with self._store.step(name) as step:
            outcome = meet(config, self._store.path(last), step.folder, records, forget, retain)
            receipt = {
                "format": FORMAT,
                "request": request_id,
                "number": number,
                "started": started,
                "finished": _now(),
                "ids": {
                    "form": config.receipt_ids,
                    "forgotten": names if config.receipt_ids == "keyed" else forget,
                },
                **outcome,
                "config": dataclasses.asdict(config),
                "previous_weights_sha256": self._weights_before(number),
                "weights_sha256": weights_hash(step.folder / MODEL),
                **{key: value for key, value in environment().items() if key != "date"},
            }
            write_summary(step.folder, receipt, _RECEIPT)
            entry = {"id": request_id, "forgotten": names}
            step.content["requests"] = [*self._store.content["requests"], entry]
            step.dropped = {
                file for file in self._store.files if file.startswith((f"{last}/{MODEL}/", f"{last}/{IMPORTANCE}"))
            }
        return self._receipt(number)

    def summary(self) -> str:
        """The session as plain text: a line for every request."""
        from pymape.report import aligned

        content = self._store.content
        rows = [["request", "finished", "records", "UA", "RA", "TA", "weights"]]
        for receipt in self.receipts:
            before, after = receipt["metrics"]["before"], receipt["metrics"]["after"]
            figures = [
                f"{before[name]:.1f} -> {after[name]:.1f}" if name in after else "-" for name in ("UA", "RA", "TA")
            ]
            count, weights = str(receipt["records"]["forget"]), receipt["weights_sha256"][:12]
            rows.append([receipt["request"], receipt["finished"], count, *figures, weights])
        asked = len(content["requests"])
        title = f"session of {content['created']}: {asked} request{'' if asked == 1 else 's'}"
        return "\n".join([title, *(aligned(rows) if asked else []), f"current weights: {self.model_folder}"])

    def _receipt(self, number: int) -> dict[str, Any]:
        receipt: dict[str, Any] = json.loads(self._store.read(f"step-{number:04d}/{_RECEIPT}"))
        return receipt

    def _weights_before(self, number: int) -> str:
        return self._receipt(number - 1)["weights_sha256"] if number > 1 else weights_hash(self.model_folder)

    def _records(self, forget: Sequence[str], config: UnlearnConfig) -> tuple[Records, list[str]]:
        """The records that no earlier request forgot, and the ids among them to retain."""
        done = {name: entry["id"] for entry in self._store.content["requests"] for name in entry["forgotten"]}
        for identifier, name in zip(forget, _names(self._key, forget), strict=True):
            if name in done:
                raise ValueError(
                    f"forget must name records not forgotten yet, got {identifier!r}, forgotten by {done[name]!r}"
                )
        source = load_records(config.data.path, config.data.id_column, argument="data.path")
        names = _names(self._key, source.ids)
        records = source.select([row for row, name in enumerate(names) if name not in done])
        known: dict[str, str] = json.loads(self._store.read(f"{FIRST}/records.json"))
        found = zip(records.ids, _names(self._key, records.ids), _digests(self._key, self.config, records), strict=True)
        changed = [identifier for identifier, name, digest in found if known.get(name) != digest]
        if changed:
            raise ValueError(f"data.path must hold the session's records, got {changed[0]!r}, which is new or changed")
        missing = len(known.keys() - done.keys()) - len(records)
        if missing:
            raise ValueError(f"data.path must hold every record not forgotten yet, got {missing} too few")
        retain = None
        if config.data.retain is not None:
            named = load_ids(config.data.retain, config.data.id_column, argument="data.retain")
            gone = {*forget, *(name for name in named if _names(self._key, [name])[0] in done)}
            retain = [name for name in named if name not in gone]
        split = split_forget(records.ids, forget, retain)
        return records, [records.ids[row] for row in split.retain]


def run_request(config: UnlearnConfig) -> dict[str, Any]:
    """Meet the request that the options name, starting the session where there is none yet, and print the result.

    A session that was started for a request that is refused is removed again, unless it has trained the model first.

    Args:
        config: options with `session`, `request_id` and `data.forget`.

    Returns:
        The receipt.

    Raises:
        ValueError: see `UnlearnSession.create` and `UnlearnSession.request`.
    """
    if config.session is None or config.request_id is None or config.data.forget is None:
        given = {"session": config.session, "request_id": config.request_id, "data.forget": config.data.forget}
        missing = " and no ".join(name for name, value in given.items() if value is None)
        raise ValueError(f"session, request_id and data.forget must come together, got no {missing}")
    forget = load_ids(config.data.forget, config.data.id_column, argument="forget_ids")
    there = (Path(config.session) / STATE).exists()
    if not there:  # before a model is copied, or even trained
        split_forget(load_records(config.data.path, config.data.id_column, argument="data.path").ids, forget)
        if config.data.test is not None:
            read_table(config.data.test, "data.test")
    session = UnlearnSession(config.session) if there else UnlearnSession.create(config.session, config)
    try:
        with session:
            receipt = session.request(config.request_id, forget, config)
    except ValueError as error:
        if not there and config.train_first:
            note = f"session {config.session!r} keeps the model trained first, and these options: delete it for others"
            raise ValueError(f"{error} ({note})") from error
        if not there:
            _remove(Path(config.session))
        raise
    print(session.summary())  # out of the `try`: what cannot be printed has happened all the same
    return receipt


def _remove(folder: Path) -> None:
    """Remove a folder that was made here, whose error is the one to be told; where it is a link, what it leads to."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if not folder.is_symlink():
        with contextlib.suppress(OSError):
            folder.rmdir()


def stored_options(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Options that the requests of a session share; None where there is no session."""
    try:
        session = UnlearnSession(folder, read_only=True)
    except ValueError:
        if (Path(folder) / STATE).exists():
            raise
        return None
    options = {name: value for name, value in dataclasses.asdict(session.config).items() if name not in _NOT_STORED}
    options["data"].pop("forget")
    return options


def weights_hash(folder: str | os.PathLike[str]) -> str:
    """sha256 of a model folder's weights, whatever files they are split into.

    It is taken over the name, dtype, shape and bytes of every tensor in the folder's safetensors files, by name.
    """
    from safetensors import safe_open

    from pymape.storage.tensors import tensor_bytes

    places: dict[str, Path] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    total = hashlib.sha256()
    for name in sorted(places):
        with safe_open(places[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor_bytes(tensor))
    return total.hexdigest()


def _check(config: UnlearnConfig) -> None:
    check_config(config)
    if config.compare_retrain:
        raise ValueError("compare_retrain must be false in a session, got true")


def _names(key: bytes, ids: Sequence[str]) -> list[str]:
    """Keyed names of records: without the key nobody can tell whose they are, not even by trying ids."""
    return [hmac.digest(key, identifier.encode(), "sha256").hex() for identifier in ids]


def _digests(key: bytes, config: UnlearnConfig, records: Records) -> list[str]:
    """A keyed fingerprint of the columns of every record that the session's options name."""
    names = [getattr(config.data, name) for name in _COLUMNS]
    columns = [records.columns.get(name, []) for name in names if name]
    return [
        hmac.digest(key, json.dumps([str(column[row]) for column in columns if column]).encode(), "sha256").hex()[:32]
        for row in range(len(records))
    ]


def _config_from(kind: Any, values: Mapping[str, Any]) -> Any:
    types = get_type_hints(kind)
    unknown = sorted(values.keys() - types.keys())
    if unknown:
        raise ValueError(f"session must be one that this version can read, got the unknown option {unknown[0]!r}")
    return kind(
        **{
            name: _config_from(types[name], value) if dataclasses.is_dataclass(types[name]) else value
            for name, value in values.items()
        }
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
