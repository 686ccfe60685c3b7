"""What `pymape s3t ...` runs: one function a command; its parameters are the command's options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pymape.s3t.config import Combination, EngineName, S3TConfig
from pymape.storage.files import atomic_write

__all__ = ["COMMANDS", "run_command"]


def init(folder: str, config: S3TConfig) -> dict[str, Any]:
    """Make a system: fixes the base model, the shards, slices and sequences.

    Args:
        folder: a new or empty folder.
        config: options of the system.
    """
    from pymape.s3t.system import S3T

    with S3T.create(folder, config) as system:
        return system.status()


def ingest(
    folder: str,
    data: str,
    id_column: str = "id",
    subject_column: str | None = None,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
) -> dict[str, Any]:
    """Put records into their slices.

    Args:
        folder: the system's folder.
        data: csv, tsv, json, jsonl or parquet file. Vision models read `pixel_values`, nested lists [C, H, W].
        id_column: column of unique ids.
        subject_column: column of the person a record is about; one person's records share a slice.
        text_column: column of the text.
        text_pair_column: column of a second text.
        label_column: column of the labels; not read for causal language models.
    """
    from pymape.s3t.tables import Columns, read_records

    columns = Columns(text_column, text_pair_column, label_column, id_column, subject_column)
    with _opened(folder) as system:
        return system.ingest(read_records(data, system.config, columns))


def train(
    folder: str,
    engine: EngineName = "local",
    workers: int | None = None,
    address: str | None = None,
    cache: bool = True,
) -> dict[str, Any]:
    """Train every stage that has not been trained; `repair` trains those anew that deletions switched off.

    Args:
        folder: the system's folder.
        engine: "local" worker processes, "inline" in this process, or "ray".
        workers: stages trained at the same time; default: as many as there are CPUs, or GPUs.
        address: of a Ray cluster; default: one is started here.
        cache: keep hidden states of frozen layers in the folder, for later stages and repairs.
    """
    with _opened(folder) as system:
        return system.train(engine=engine, workers=workers, address=address, cache=cache)


def repair(
    folder: str,
    engine: EngineName = "local",
    workers: int | None = None,
    address: str | None = None,
    cache: bool = True,
) -> dict[str, Any]:
    """Train the stages that deletions switched off anew, on the records that are left.

    Args:
        folder: the system's folder.
        engine: "local" worker processes, "inline" in this process, or "ray".
        workers: stages trained at the same time; default: as many as there are CPUs, or GPUs.
        address: of a Ray cluster; default: one is started here.
        cache: keep hidden states of frozen layers in the folder, for later stages and repairs.
    """
    with _opened(folder) as system:
        return system.repair(engine=engine, workers=workers, address=address, cache=cache)


def status(folder: str) -> dict[str, Any]:
    """Show records, stages, depth of every shard and requests.

    Args:
        folder: the system's folder.
    """
    with _opened(folder, read_only=True) as system:
        return system.status()


def plan(folder: str, ids: str | None = None, subjects: str | None = None, id_column: str = "id") -> dict[str, Any]:
    """Show what a deletion would do, without doing it.

    Args:
        folder: the system's folder.
        ids: file of the ids of records, one per line, or a table.
        subjects: file of the ids of subjects, one per line, or a table: all records of these people.
        id_column: of such a table.
    """
    named, people = _asked(ids, subjects, id_column)
    with _opened(folder, read_only=True) as system:
        return system.plan(named, subjects=people)


def delete(
    folder: str,
    request_id: str,
    ids: str | None = None,
    subjects: str | None = None,
    id_column: str = "id",
    receipt: str | None = None,
) -> dict[str, Any]:
    """Delete records: switch off and erase everything that was trained on them.

    Args:
        folder: the system's folder.
        request_id: your name of the request; repeating it is harmless.
        ids: file of the ids of records, one per line, or a table.
        subjects: file of the ids of subjects, one per line, or a table: all records of these people.
        id_column: of such a table.
        receipt: file to keep the receipt in as JSON, outside the folder, for `verify --receipts`.
    """
    from pymape.s3t.system import not_finished

    with _opened(folder) as system:
        named, people = _asked(ids, subjects, id_column)
        system.delete(named, request_id, subjects=people, finish=False)
        found = system.finish(check=False)
        problems = [not_finished(request_id, found.pop(request_id))] if request_id in found else []
        others = [not_finished(request, problem) for request, problem in found.items()]
        others += system.missing_exports()
        state = system.receipt(request_id)
        for outcome in state["revoked"]:
            if outcome["changed"]:
                names = ", ".join(outcome["changed"])
                problems.append(f"export {outcome['path']!r} has files that were changed and are left there: {names}")
        if receipt is not None:
            try:
                with atomic_write(receipt) as path:
                    path.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            except OSError as error:  # the request is accepted all the same
                problems.append(f"the receipt is not kept in {receipt!r}: {error}")
        return {**state, "ok": not problems, "problems": problems, "unfinished": others}


def receipt(folder: str, request_id: str) -> dict[str, Any]:
    """Show the receipt of a request, in its present state.

    Args:
        folder: the system's folder.
        request_id: your name of the request.
    """
    with _opened(folder, read_only=True) as system:
        return system.receipt(request_id)


def finish(folder: str, accept_lost_anchor: bool = False) -> dict[str, Any]:
    """Go on with the requests that are not finished: erase and verify what could not be erased before.

    Args:
        folder: the system's folder.
        accept_lost_anchor: open the system without its file audit.head, after you have made sure that the rest of the
            folder is not an older copy; the audit log notes it.
    """
    from pymape.s3t.system import not_finished

    with _opened(folder, accept_lost_anchor=accept_lost_anchor) as system:
        problems = [not_finished(request, problem) for request, problem in system.finish(check=False).items()]
        return {"requests": system.status()["requests"], "ok": not problems, "problems": problems}


def verify(folder: str, replay: bool = False, receipts: str | None = None) -> dict[str, Any]:
    """Check audit chain, files and provenance; changes nothing, also while another process trains or deletes.

    Args:
        folder: the system's folder.
        replay: also train one served stage again and compare bit by bit.
        receipts: a receipt kept elsewhere, as `delete --receipt` writes it, or a folder of such files: they tell
            whether the system was set back.
    """
    kept, unreadable = ([], []) if receipts is None else _receipts(Path(receipts))
    with _opened(folder, read_only=True) as system:
        found = system.verify(replay=replay, receipts=kept)
    return found | {"ok": found["ok"] and not unreadable, "problems": [*unreadable, *found["problems"]]}


def forecast(folder: str, rate: float | None = None) -> dict[str, Any]:
    """Say how many more records can be deleted before a shard is dead, and before all are.

    Args:
        folder: the system's folder.
        rate: records deleted a day; default: what the ledger has seen.
    """
    with _opened(folder, read_only=True) as system:
        return system.forecast(rate)


def export(folder: str, output: str, combination: Combination = "mean") -> dict[str, Any]:
    """Write the served shards as PEFT adapters that load without pymape.

    Args:
        folder: the system's folder.
        output: a new or empty folder. A later deletion revokes what it concerns there.
        combination: how the shards' answers are to be combined, as the export's README says.
    """
    with _opened(folder) as system:
        return {"output": output, "files": system.export(output, combination=combination)}


def evaluate(
    folder: str,
    data: str,
    combination: Combination = "mean",
    id_column: str | None = None,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    batch_size: int = 32,
) -> dict[str, Any]:
    """Measure the ensemble and every shard on records that are in no slice.

    Args:
        folder: the system's folder.
        data: file of the records, as for ingest.
        combination: how the shards' answers are combined.
        id_column: column of ids, where there is one.
        text_column: column of the text.
        text_pair_column: column of a second text.
        label_column: column of the labels.
        batch_size: records per forward pass.
    """
    from pymape.s3t.tables import Columns, read_records

    columns = Columns(text_column, text_pair_column, label_column, id_column)
    with _opened(folder, read_only=True) as system:
        records = read_records(data, system.config, columns)
        return system.evaluate(records, combination=combination, batch_size=batch_size)


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (
        init, ingest, train, status, plan, delete, receipt, finish, repair, verify, forecast, export, evaluate
    )
}  # fmt: skip


def run_command(name: str, options: dict[str, Any], *, as_json: bool = False) -> bool:
    """Run a command and print what it returns.

    Args:
        name: a key of `COMMANDS`.
        options: its arguments.
        as_json: print JSON instead of text.

    Returns:
        False where it found something wrong (`verify`), could not finish what was accepted (`delete`, `finish`), or
        left changed files of an export (`delete`).
    """
    found = COMMANDS[name](**options)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        from pymape.s3t.text import describe

        print(describe(name, found))
    return bool(found.get("ok", True))


def _opened(folder: str, **options: bool) -> Any:
    """The `S3T` in a folder. Its type would be imported for `pymape --help`, which is not to wait for transformers."""
    from pymape.s3t.system import S3T

    return S3T(folder, **options)


def _receipts(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What a file holds, or every .json file of a folder, and a sentence for each file that holds no receipt."""
    from pymape.s3t.ledger.requests import is_receipt

    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"receipts must be a JSON file or a folder of some, got {str(path)!r} without one")
    receipts, problems = [], []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"receipt {str(file)!r} cannot be read: {error}")
            continue
        if is_receipt(content):
            receipts.append(content)
        else:
            problems.append(f"receipt {str(file)!r} is none")
    return receipts, problems


def _asked(ids: str | None, subjects: str | None, id_column: str) -> tuple[list[str], list[str]]:
    """What the files of ids and of subjects name."""
    from pymape.data.tables import load_ids

    files = (("ids", ids), ("subjects", subjects))
    named, people = ([] if path is None else load_ids(path, id_column, argument=name) for name, path in files)
    return named, people
