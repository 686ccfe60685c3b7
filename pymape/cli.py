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

from pymape.config import DemoConfig, EvaluateConfig, UnlearnConfig
from pymape.s3t.commands import COMMANDS, run_command
from pymape.s3t.config import S3TConfig, S3TDemoConfig
from pymape.version import __version__

__all__ = ["main"]

_FOUND_WRONG = 1
_FAILED = 2
_INTERRUPTED = 130
_LONGEST = 1000  # characters of an error message
_SWITCHES = {  # options of S3T commands that take no value
    "verify": {"replay": "Also train one served stage again and compare bit by bit."},
    "finish": {
        "accept_lost_anchor": "Open the system without its file audit.head, after you have made sure that the rest of "
        "the folder is not an older copy; the audit log notes it."
    },
}
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
        Exit code: 0, 1 where a check found something wrong, 2 after bad input (reported in one line on stderr), 130
        after an interruption (Ctrl-C or SIGTERM).
    """
    words = _with_lists(list(sys.argv[1:] if arguments is None else arguments))
    # `pymape unlearn CONFIG.yaml` is short for `pymape unlearn --config CONFIG.yaml`.
    if len(words) > 1 and words[0] in ("demo", "unlearn", "evaluate") and not words[1].startswith("-"):
        words.insert(1, "--config")
    try:
        with _terminable():
            return _run(_parsed(_with_session(words)))
    except (ArgumentError, ValueError, OSError, ImportError) as error:
        print(f"pymape: error: {_one_line(error, words)}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("pymape: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _parsed(words: list[str]) -> Namespace:
    """The options of a command line.

    Raises:
        ArgumentError, ValueError: invalid words, or an invalid file of options.
    """
    file = (_values(words, "--config") or [""])[-1]  # a session's own come first
    try:
        return _parser().parse_args(words)
    except UnicodeDecodeError as error:
        raise ValueError(f"--config must be a text file of options, got {file!r}: {error}") from error
    except ArgumentError as error:
        if "Unexpected config" in str(error):  # and all that it holds, which need not be options
            raise ValueError(f"--config must be a YAML file with lines `option: value`, got {file!r}") from error
        if words[:2] == ["s3t", "init"] and type(error.__cause__) is KeyError:
            # jsonargparse fails where it names an option that a subcommand of a subcommand lacks.
            _s3t_command("init").parse_args(words[2:])
        raise


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


def _run(options: Namespace) -> int:
    if options.subcommand == "s3t":
        return _run_s3t(options.s3t)
    if options.subcommand == "demo":
        from pymape.commands.demo import run_demo

        run_demo(_built(DemoConfig, options.demo))
    elif options.subcommand == "unlearn":
        _unlearn(_built(UnlearnConfig, options.unlearn))
    elif options.subcommand == "evaluate":
        from pymape.commands.evaluate import run_evaluate

        run_evaluate(_built(EvaluateConfig, options.evaluate))
    elif options.subcommand == "experiment":
        from pymape.experiments.runner import run_experiment

        run_experiment(**vars(options.experiment.run))
    elif options.subcommand == "report":
        from pymape.experiments.page import run_report

        run_report(options.report.runs, options.report.output)
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
    return 0


def _run_s3t(options: Namespace) -> int:
    name = options.subcommand
    values = {key: value for key, value in vars(options[name]).items() if key != "config"}
    as_json = values.pop("json")
    if name == "demo":
        from pymape.s3t.demo import run_s3t_demo

        run_s3t_demo(S3TDemoConfig(**values), as_json=as_json)
        return 0
    if name == "init":
        values = {"folder": values["folder"], "config": _built(S3TConfig, options[name])}
    return 0 if run_command(name, values, as_json=as_json) else _FOUND_WRONG


def _unlearn(config: UnlearnConfig) -> None:
    if config.session is None and config.request_id is None:
        from pymape.commands.unlearn import run_unlearn

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
    """The command line with short options written out and a session's stored options put first."""
    if words[:1] == ["s3t"]:
        split = (word.partition("=") for word in words)
        return [
            (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + sign + value
            for name, sign, value in split
        ]
    if not words or words[0] != "unlearn":
        return words
    words = [_SHORT.get(name, name) + sign + value for name, sign, value in (word.partition("=") for word in words)]
    given = _values(words, "--session")
    if given:
        from pymape.session import stored_options

        options = stored_options(given[-1])
        if options is not None:
            return [words[0], "--config", json.dumps(options), *words[1:]]
    return words


def _values(words: Sequence[str], name: str) -> list[str]:
    """What a command line gives for an option."""
    attached = [word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}=")]
    return attached + [value for word, value in pairwise(words) if word == name]


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="pymape", description="Make a Transformer forget.", exit_on_error=False)
    parser.add_argument("--version", action="version", version=f"pymape {__version__}")
    commands = parser.add_subcommands(required=True)
    for name, config, text in (
        ("demo", DemoConfig, "unlearn scikit-learn's digits and compare with retraining"),
        ("unlearn", UnlearnConfig, "unlearn records of your own data from your own model"),
        ("evaluate", EvaluateConfig, "measure an unlearned model and keep every record's scores"),
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
    _add_experiment(commands)
    s3t = ArgumentParser(description="Exact unlearning: train in slices, delete by switching off.", exit_on_error=False)
    commands.add_subcommand("s3t", s3t, help="exact unlearning: train in slices, delete by switching off")
    _add_s3t(s3t)
    return parser


def _add_experiment(commands: Any) -> None:
    experiment = ArgumentParser(description="Compare methods with retraining, over seeds.", exit_on_error=False)
    commands.add_subcommand("experiment", experiment, help="compare methods with retraining, over seeds")
    run = ArgumentParser(description="Run what is missing of an experiment and write its tables.", exit_on_error=False)
    run.add_argument("name", help="YAML file, or the name of one in experiments/.")
    run.add_argument("--seeds", type=int, nargs="+", help="In place of the file's.")
    run.add_argument("--settings", nargs="+", help="Names of those to run (default: all of the file's).")
    run.add_argument("--workers", type=int, help="Processes of one thread each (default: as many as there are CPUs).")
    run.add_argument("--output", help="Folder to write or to go on with (default: runs/NAME).")
    run.add_argument("--data", help="In place of the file's task.data.")
    run.add_argument("--model", help="In place of the file's task.model.")
    experiment.add_subcommands(required=True).add_subcommand("run", run, help="run what is missing of an experiment")
    report = ArgumentParser(description="Write one page about finished experiments.", exit_on_error=False)
    report.add_argument("runs", nargs="+", help="Folders that pymape experiment run wrote.")
    report.add_argument("--output", default="report.html", help="File to write.")
    commands.add_subcommand("report", report, help="write one page about finished experiments")


def _add_s3t(parser: ArgumentParser) -> None:
    commands = parser.add_subcommands(required=True)
    for name in COMMANDS:
        commands.add_subcommand(name, _s3t_command(name), help=_title(name).rstrip(".").lower())
    demo = ArgumentParser(description="Train, delete until a shard dies, compare with SISA.", exit_on_error=False)
    demo.add_class_arguments(S3TDemoConfig)
    demo.add_argument("--json", action="store_true", help="Print JSON.")
    commands.add_subcommand("demo", demo, help="train, delete until a shard dies, compare with SISA")


def _title(name: str) -> str:
    return (COMMANDS[name].__doc__ or "").split("\n")[0]


def _s3t_command(name: str) -> ArgumentParser:
    command = ArgumentParser(description=_title(name), exit_on_error=False)
    command.add_argument("folder", help="The system's folder.")
    if name == "init":
        command.add_argument("--config", action="config", help="YAML file of options; flags after it override it.")
        command.add_class_arguments(S3TConfig)
    else:
        command.add_function_arguments(COMMANDS[name], skip={"folder", *_SWITCHES.get(name, ())})
    for switch, text in _SWITCHES.get(name, {}).items():
        command.add_argument(f"--{switch}", action="store_true", help=text)
    command.add_argument("--json", action="store_true", help="Print JSON.")
    return command


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


def _one_line(error: BaseException, words: Sequence[str]) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = re.sub(r'Parser key "([^"]+)":', r"--\1:", str(error))
    for prefix in (".".join(words[:depth]) for depth in (2, 1) if words):
        # The parser names what is missing with the subcommand before it.
        text = re.sub(rf"(?<=[:,] ){re.escape(prefix)}\.", "", text)
    line = " ".join(text.split()) or type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
