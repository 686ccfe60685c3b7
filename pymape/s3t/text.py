"""What the commands of an S3T system print."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pymape.report.text import aligned

__all__ = ["describe"]


def describe(command: str, found: dict[str, Any]) -> str:
    """The result of a command as plain text.

    Args:
        command: its name.
        found: what it returned.
    """
    return _WRITERS[command](found)


def _status(found: dict[str, Any]) -> str:
    rows = [["shard", "records", "depth", "serving slices", "generation"]]
    for shard in found["shards"]:
        prefix = " ".join(map(str, shard["serving"])) or shard["state"]
        depth = f"{shard['depth']} of {found['slices']}"
        rows.append([str(shard["shard"]), str(shard["records"]), depth, prefix, str(shard["generation"])])
    stages = ", ".join(f"{count} {state}" for state, count in found["stages"].items()) or "none yet"
    orders = " ".join("".join(map(str, order)) if found["slices"] <= 10 else str(order) for order in found["sequences"])
    return "\n".join([
        f"S3T system in {found['folder']}",
        f"base model: {found['model']}, {found['layers_per_slice']} layers a slice",
        f"sequences: {orders}",
        f"stages: {stages}",
        f"requests: {_counts(found['requests'])}",
        "",
        *aligned(rows),
    ])  # fmt: skip


def _ingest(found: dict[str, Any]) -> str:
    return f"{found['added']} records added, {found['already_there']} already there"


def _train(found: dict[str, Any]) -> str:
    discarded = f", {found['discarded']} discarded (their records were deleted meanwhile)" if found["discarded"] else ""
    off = f"; {found['switched_off']} are switched off: `repair` trains them anew" if found["switched_off"] else ""
    return f"{found['trained']} stages trained{discarded}{off}"


def _deletion(found: dict[str, Any]) -> str:
    rows = [["shard", "depth before", "after"]]
    rows += [[str(s["shard"]), str(s["depth_before"]), str(s["depth_after"])] for s in found["shards"]]
    return "\n".join([
        f"records: {found['records']}",
        f"stages switched off: {found['stages']}, {found['bytes']:,} bytes to erase",
        *_exports(found),
        *aligned(rows),
    ])  # fmt: skip


def _exports(found: dict[str, Any]) -> list[str]:
    """What became of the exports of a request, and what will."""
    lines, over = [], set()
    for outcome in found.get("revoked", []):
        parts = [f"{len(outcome['erased'])} files erased"]
        for kind, what in (("changed", "changed since and left there"), ("missing", "not there any more")):
            parts += [f"{what}: {', '.join(outcome[kind])}"] if outcome[kind] else []
        lines.append(f"export {outcome['path']}: {'; '.join(parts)}")
        over.add(outcome["path"])
    return lines + [f"export {path}: to be erased" for path in found["exports"] if path not in over]


def _receipt(found: dict[str, Any]) -> str:
    return "\n".join([*_remarks(found), f"request {found['request']}: {found['state']}", _deletion(found)])


def _finish(found: dict[str, Any]) -> str:
    return "\n".join([*_remarks(found), f"requests: {_counts(found['requests'])}"])


def _remarks(found: dict[str, Any]) -> list[str]:
    """What is wrong, and what is still to be done."""
    problems = [f"PROBLEM: {problem}" for problem in found.get("problems", [])]
    return problems + [f"NOT FINISHED: {line}" for line in found.get("unfinished", [])]


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in found.items()) or "none"


def _verify(found: dict[str, Any]) -> str:
    counts = {name.replace("_", " "): "nothing" if value is None else value for name, value in found["checked"].items()}
    checked = ", ".join(f"{name}: {value}" for name, value in counts.items())
    order = f"everything {'else ' if found['unfinished'] else ''}is in order" if found["ok"] else "not in order"
    return "\n".join([*_remarks(found), f"checked {checked}", order])


def _figures(found: dict[str, Any]) -> str:
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in found.items():
        label = f"{indent}{str(name).replace('_', ' ')}:"
        if isinstance(value, dict):
            lines += [label, *_lines(value, indent + "  ")]
        else:
            text = f"{value:.1f}" if isinstance(value, float) else "-" if value is None else str(value)
            lines.append(f"{label} {text}")
    return lines


def _export(found: dict[str, Any]) -> str:
    return f"{len(found['files'])} files in {found['output']}"


_WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "init": _status,
    "ingest": _ingest,
    "train": _train,
    "repair": _train,
    "status": _status,
    "plan": _deletion,
    "delete": _receipt,
    "receipt": _receipt,
    "finish": _finish,
    "verify": _verify,
    "forecast": _figures,
    "export": _export,
    "evaluate": _figures,
}
