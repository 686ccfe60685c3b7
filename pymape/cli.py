"""The `pymape` command."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from . import __version__
from .config import DemoConfig, UnlearnConfig

__all__ = ["main"]

_FAILED = 2
_INTERRUPTED = 130


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
    words = list(sys.argv[1:] if arguments is None else arguments)
    # `pymape unlearn CONFIG.yaml` is short for `pymape unlearn --config CONFIG.yaml`.
    if len(words) > 1 and words[0] in ("demo", "unlearn") and not words[1].startswith("-"):
        words.insert(1, "--config")
    try:
        with _terminable():
            _run(_parser().parse_args(words))
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
        from .demo import run_demo

        run_demo(_built(DemoConfig, options.demo))
    elif options.subcommand == "unlearn":
        from .pipeline import run_unlearn

        run_unlearn(_built(UnlearnConfig, options.unlearn))
    else:
        from .masks import ModuleMasks

        show = options.masks.show
        masks = ModuleMasks.load(show.file)
        print(masks.summary())
        if show.plot is not None:
            masks.plot(show.plot)


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
