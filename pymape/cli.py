"""The `pymape` command."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from pymape import __version__
from pymape.config import DemoConfig, UnlearnConfig

__all__ = ["main"]

_FAILED = 2
_INTERRUPTED = 130
_SHORT = {"--forget-ids": "--data.forget", "--request-id": "--request_id"}


@dataclass
class _Show:
    """Masks on disk.

    Args:
        plot: also draw them into this file (png, svg or pdf).
    """

    plot: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: command line without the program's name; default: that of the process.

    Returns:
        Exit code: 0, 2 after bad input (reported in one line on stderr), 130 after an interruption (Ctrl-C or SIGTERM).
    """
    words = _with_lists(list(sys.argv[1:] if arguments is None else arguments))
    # `pymape unlearn CONFIG.yaml` is short for `pymape unlearn --config CONFIG.yaml`.
    if len(words) > 1 and words[0] in ("demo", "unlearn") and not words[1].startswith("-"):
        words.insert(1, "--config")
    try:
        with _terminable():
            _run(_parser().parse_args(_with_session(words)))
    except (ArgumentError, ValueError, OSError, ImportError) as error:
        print(f"pymape: error: {_one_line(error)}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("pymape: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that what was begun is cleaned up."""
    if threading.current_thread() is not threading.main_thread():  # signals can be set from the main thread only
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: Namespace) -> None:
    if options.subcommand == "demo":
        from pymape.demo import run_demo

        run_demo(_built(DemoConfig, options.demo))
    elif options.subcommand == "unlearn":
        _unlearn(_built(UnlearnConfig, options.unlearn))
    elif options.subcommand == "session":
        from pymape.session import UnlearnSession

        session = UnlearnSession(options.session.show.folder, read_only=True)
        session.verify()
        print(session.summary())
    else:
        from pymape.masks import ModuleMasks

        show = options.masks.show
        masks = ModuleMasks.load(show.file)
        print(masks.summary())
        if show.plot is not None:
            masks.plot(show.plot)


def _unlearn(config: UnlearnConfig) -> None:
    if config.session is None and config.request_id is None:
        from pymape.pipeline import run_unlearn

        run_unlearn(config)
    else:
        from pymape.session import run_request

        run_request(config)


def _with_lists(words: list[str]) -> list[str]:
    """The command line with the lists of the demo, `--lrs 1e-3,2e-3` or `--settings class`, in brackets."""
    if words[:1] != ["demo"]:
        return words
    lists = {f"--{name}" for name, kind in get_type_hints(DemoConfig).items() if get_origin(kind) is list}
    found, rest = [], iter(words)
    for word in rest:
        name, sign, value = word.partition("=")
        if name in lists:
            value = value if sign else next(rest, "")
            word = f"{name}={value if value.startswith('[') else f'[{value}]'}"
        found.append(word)
    return found


def _with_session(words: list[str]) -> list[str]:
    """The command line with a session's short options written out and its stored options put first."""
    if not words or words[0] != "unlearn":
        return words
    words = [_SHORT.get(name, name) + sign + value for name, sign, value in (word.partition("=") for word in words)]
    given = [word.removeprefix("--session=") for word in words if word.startswith("--session=")]
    given += [value for word, value in pairwise(words) if word == "--session"]
    if given:
        from pymape.session import stored_options

        options = stored_options(given[-1])
        if options is not None:
            return [words[0], "--config", json.dumps(options), *words[1:]]
    return words


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="pymape", description="Make a Transformer forget.", exit_on_error=False)
    parser.add_argument("--version", action="version", version=f"pymape {__version__}")
    commands = parser.add_subcommands(required=True)
    for name, config, text in (
        ("demo", DemoConfig, "unlearn scikit-learn's digits and compare with retraining"),
        ("unlearn", UnlearnConfig, "unlearn records of your own data from your own model"),
    ):
        command = ArgumentParser(description=f"{text[0].upper()}{text[1:]}.", exit_on_error=False)
        command.add_argument("--config", action="config", help="YAML file of options; flags after it override it.")
        command.add_class_arguments(config)
        commands.add_subcommand(name, command, help=text)
    masks = ArgumentParser(description="Inspect mask files.", exit_on_error=False)
    commands.add_subcommand("masks", masks, help="inspect mask files")
    show = ArgumentParser(description="Print what a mask file selects.", exit_on_error=False)
    show.add_argument("file", help="Mask file that pymape wrote.")
    show.add_class_arguments(_Show)
    masks.add_subcommands(required=True).add_subcommand("show", show, help="print what a mask file selects")
    session = ArgumentParser(description="Inspect a session of successive requests.", exit_on_error=False)
    commands.add_subcommand("session", session, help="inspect a session of successive requests")
    show = ArgumentParser(description="Check a session's files and list its requests.", exit_on_error=False)
    show.add_argument("folder", help="Folder given as --session to pymape unlearn.")
    session.add_subcommands(required=True).add_subcommand("show", show, help="check its files and list its requests")
    return parser


def _built(config: Any, options: Namespace) -> Any:
    """The dataclass of parsed options, with those nested in it."""
    types = get_type_hints(config)
    values = {name: value for name, value in vars(options).items() if name in types}
    return config(
        **{
            name: _built(types[name], value) if isinstance(value, Namespace) else value
            for name, value in values.items()
        }
    )


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = re.sub(r'Parser key "([^"]+)":', r"--\1:", str(error))
    return " ".join(text.split()) or type(error).__name__
