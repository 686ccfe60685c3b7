"""What an experiment's YAML file holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pymape.errors import check_ranges
from pymape.experiments.kinds import KINDS
from pymape.search import Mode, Objective

__all__ = [
    "EvidenceConfig",
    "ExperimentConfig",
    "MethodConfig",
    "SelectionConfig",
    "SettingConfig",
    "TaskConfig",
    "find_experiment",
    "read_experiment",
]

_FOLDER = "experiments"
# What a kind of selection depends on.
_READ = {
    "everything": (),
    "modules": ("objective", "budget", "lam", "mode", "normalize", "across_layers", "samples", "average"),
    "gates": ("budget", "lam", "samples"),
    "last_layers": ("layers",),
    "saliency": ("budget", "samples"),
    "lora": ("rank",),
}


@dataclass
class TaskConfig:
    """Data and model.

    Args:
        name: "digits" (scikit-learn's), "arrays" (an npz file of images), "folder" (one folder of images a class),
            "table" (text files with a label column), "questions" (questions about articles, a SQuAD file), or "tofu"
            (questions about invented authors, for a small language model).
        data: the file or folder that the task reads; digits need none.
        model: folder of a pretrained encoder and its tokenizer, for "table" and "questions".
        options: further arguments of the task, see `pymape.experiments.tasks`.
        epochs: passes over the data when the original and the retrained model are trained.
        lr: their peak learning rate.
        batch_size: their records per step.
        weight_decay: theirs.
    """

    name: Literal["digits", "arrays", "folder", "table", "questions", "tofu"]
    data: str | None = None
    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 40
    lr: float = 1e-3
    batch_size: int = 64
    weight_decay: float = 0.05


@dataclass
class SettingConfig:
    """What is forgotten.

    Args:
        forget: a whole class (the seed modulo the number of classes), random training records, or all training records
            of whole groups (articles, authors).
        share: share of the training records, in (0, 1), for random ones.
        groups: number of groups, at least 1.
        which: groups drawn by the seed, or the last ones in the order of the data.
        requests: one after the other, each for another share of random records; the model and the records that are left
            go from one to the next, the importance of all records is the original model's.
        lam: weight of the retain set where masks are learned.
    """

    forget: Literal["class", "random", "groups"] = "random"
    share: float = 0.1
    groups: int = 1
    which: Literal["drawn", "last"] = "drawn"
    requests: int = 1
    lam: float = 1.0

    def identity(self) -> dict[str, Any]:
        """All that the choice of the records depends on, beside the seed."""
        if self.forget == "groups":
            return {"forget": self.forget, "groups": self.groups, "which": self.which}
        found = {"forget": self.forget, "share": self.share if self.forget == "random" else None}
        return found if self.requests == 1 else {**found, "requests": self.requests}


@dataclass
class SelectionConfig:
    """Which parameters a method trains.

    Args:
        kind: "everything"; "modules" (heads and filters, by `objective` within `budget`); "gates" (modules whose gates
            are learned by gradient descent); "last_layers" (all heads and filters of the last `layers`); "saliency"
            (SalUn: the `budget` share of all parameters with the largest forget gradient); "lora" (adapters of `rank`).
        objective: what the masks maximise.
        budget: share of parameters, in (0, 1].
        lam: weight of the retain set; None takes the setting's.
        mode: how the masks are searched.
        normalize: count every layer's heads, and every layer's filters, alike.
        across_layers: let modules of different layers trade places.
        samples: most records of either set that the masks are learned from; None takes all.
        average: records whose gradients are averaged into one, as a batch's gradient does; 1 keeps every record's own.
        layers: number of layers.
        rank: of the adapters.
    """

    kind: Literal["everything", "modules", "gates", "last_layers", "saliency", "lora"] = "everything"
    objective: Objective = "difference"
    budget: float = 0.1
    lam: float | None = None
    mode: Mode = "greedy"
    normalize: bool = True
    across_layers: bool = False
    samples: int | None = None
    average: int = 1
    layers: int = 1
    rank: int = 8

    def identity(self, lam: float) -> dict[str, Any]:
        """All that the selection depends on, where the setting's weight of the retain set is `lam`."""
        found = {"kind": self.kind} | {name: getattr(self, name) for name in _READ[self.kind]}
        if "lam" in found:
            found["lam"] = lam if self.lam is None else self.lam
        if self.average == 1:
            found.pop("average", None)
        if self.kind == "modules" and self.objective != "difference":
            del found["lam"]
        if self.kind == "modules" and self.objective in ("random", "magnitude"):
            found = {name: found[name] for name in ("kind", "objective", "budget")}
        return found


@dataclass
class MethodConfig:
    """An unlearning objective beside those that are crossed with all selections.

    Args:
        objective: name of an objective.
        selections: names of the selections to cross it with.
        options: values for the objective's own options.
        parameter: what is tuned: "lr", "gamma", or an option of the objective.
        values: what it may be, as many as there are learning rates; empty for "lr" takes the experiment's.
        settings: names of the settings to cross it with; empty takes all.
    """

    objective: str
    selections: list[str] = field(default_factory=lambda: ["everything"])
    options: dict[str, Any] = field(default_factory=dict)
    parameter: str = "lr"
    values: list[float] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)


@dataclass
class EvidenceConfig:
    """What is measured of the chosen models once the grid is done.

    Args:
        selections: names of the selections whose models are looked at; None takes all.
        relearn_steps: optimizer steps of the relearning attack; 0 leaves it out.
        relearn_every: steps between two of its measurements.
        relearn_lr: its learning rate.
        shadows: classifiers retrained from other initial weights, for the likelihood-ratio attack; 0 leaves it out.
        gradients: also attack by gradient norms, one backward pass per record.
        max_new_tokens: most tokens of an answer to a question, which ROUGE judges; 0 leaves ROUGE out.
    """

    selections: list[str] | None = None
    relearn_steps: int = 50
    relearn_every: int = 5
    relearn_lr: float = 1e-4
    shadows: int = 0
    gradients: bool = False
    max_new_tokens: int = 200

    def check(self, selections: Collection[str]) -> None:
        """Refuse options out of range, and names that are not among the experiment's selections.

        Raises:
            ValueError: saying which.
        """
        ranges: dict[str, tuple[Any, bool, str]] = {
            "relearn_steps": (self.relearn_steps, self.relearn_steps >= 0, "not negative"),
            "relearn_every": (self.relearn_every, self.relearn_every >= 1, "at least 1"),
            "relearn_lr": (self.relearn_lr, 0 < self.relearn_lr < math.inf, "positive and finite"),
            "shadows": (self.shadows, self.shadows == 0 or self.shadows >= 2, "0, or 2 or more"),
            "max_new_tokens": (self.max_new_tokens, self.max_new_tokens >= 0, "not negative"),
        }
        unknown = [name for name in self.selections or () if name not in selections]
        ranges["selections"] = (", ".join(unknown), not unknown, f"among {', '.join(selections)}")
        check_ranges(ranges, prefix="evidence.")


@dataclass
class ExperimentConfig:
    """A grid: settings x seeds x methods x values of what is tuned.

    Args:
        task: data and model.
        settings: what is forgotten, by name.
        seeds: of data split, training, masks and unlearning.
        selections: which parameters are trained, by name.
        objectives: objectives to cross with all selections.
        methods: further methods.
        lrs: learning rates that every method chooses from.
        steps: optimizer steps of an unlearning run.
        every: optimizer steps between two looks at the model of a run: the rule that chooses the value of what is tuned
            chooses the step too. None looks at the last step only.
        batch_size: forget records per step, and as many retain records.
        baselines: selections that the others are held against, objective by objective.
        title: heading of the report.
        note: sentence about the experiment for the report.
        evidence: what is measured of the chosen models once the grid is done; None for nothing.
    """

    task: TaskConfig
    settings: dict[str, SettingConfig]
    seeds: list[int]
    selections: dict[str, SelectionConfig] = field(default_factory=lambda: {"everything": SelectionConfig()})
    objectives: list[str] = field(default_factory=list)
    methods: list[MethodConfig] = field(default_factory=list)
    lrs: list[float] = field(default_factory=lambda: [2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3])
    steps: int = 30
    every: int | None = None
    batch_size: int = 32
    baselines: list[str] = field(default_factory=lambda: ["everything"])
    title: str = ""
    note: str = ""
    evidence: EvidenceConfig | None = field(default_factory=EvidenceConfig)

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_settings()
        self._check_names()
        if self.evidence is not None:
            self.evidence.check(self.selections)

    @property
    def all_methods(self) -> list[MethodConfig]:
        """The objectives crossed with all selections, then the further methods; every one with its values."""
        crossed = [MethodConfig(objective, list(self.selections)) for objective in self.objectives]
        found = [*crossed, *self.methods]
        return [
            replace(method, values=method.values or list(self.lrs), settings=method.settings or list(self.settings))
            for method in found
        ]

    def narrowed(self, names: Sequence[str]) -> ExperimentConfig:
        """The same experiment with these settings alone."""
        methods = [replace(m, settings=[name for name in m.settings if name in names]) for m in self.methods]
        left = [new for old, new in zip(self.methods, methods, strict=True) if new.settings or not old.settings]
        return replace(self, settings={name: self.settings[name] for name in names}, methods=left)

    def _check_numbers(self) -> None:
        ranges: dict[str, tuple[Any, bool, str]] = {
            "seeds": (self.seeds, len(set(self.seeds)) == len(self.seeds) > 0, "at least one, each once"),
            "lrs": (self.lrs, bool(self.lrs) and all(0 < lr < math.inf for lr in self.lrs), "positive learning rates"),
            "steps": (self.steps, self.steps >= 1, "at least 1"),
            "every": (self.every, self.every is None or self.every >= 1, "at least 1"),
            "batch_size": (self.batch_size, self.batch_size >= 1, "at least 1"),
            "task.epochs": (self.task.epochs, self.task.epochs >= 1, "at least 1"),
            "task.batch_size": (self.task.batch_size, self.task.batch_size >= 1, "at least 1"),
            "settings": (list(self.settings), bool(self.settings), "at least one"),
        }
        for name, setting in self.settings.items():
            ranges[f"settings.{name}.share"] = (setting.share, 0 < setting.share < 1, "in (0, 1)")
            ranges[f"settings.{name}.groups"] = (setting.groups, setting.groups >= 1, "at least 1")
            ranges[f"settings.{name}.lam"] = (setting.lam, 0 <= setting.lam < math.inf, "finite and not negative")
            asked, random = setting.requests, setting.forget == "random"
            valid = asked >= 1 and asked * setting.share < 1 if random else asked == 1
            expected = "at least 1, of shares below 1 together" if random else "1 where no random records are forgotten"
            ranges[f"settings.{name}.requests"] = (asked, valid, expected)
        for name, selection in self.selections.items():
            ranges[f"selections.{name}.budget"] = (selection.budget, 0 < selection.budget <= 1, "in (0, 1]")
            ranges[f"selections.{name}.layers"] = (selection.layers, selection.layers >= 1, "at least 1")
            ranges[f"selections.{name}.rank"] = (selection.rank, selection.rank >= 1, "at least 1")
            ranges[f"selections.{name}.average"] = (selection.average, selection.average >= 1, "at least 1")
            samples = selection.samples
            ranges[f"selections.{name}.samples"] = (samples, samples is None or samples >= 1, "at least 1")
            if any(setting.requests > 1 for setting in self.settings.values()):
                ranges[f"selections.{name}.samples"] = (
                    samples,
                    samples is None,
                    "all where there are several requests",
                )
        check_ranges(ranges)

    def _check_settings(self) -> None:
        """Refuse what the task has nothing of to forget."""
        for name, setting in self.settings.items():
            kinds = ("random", "groups") if KINDS[self.task.name].grouped else ("random", "class")
            if setting.forget not in kinds:
                raise ValueError(
                    f"settings.{name}.forget must be {' or '.join(kinds)} for task {self.task.name!r}, "
                    f"got {setting.forget!r}"
                )

    def _check_names(self) -> None:
        if not self.objectives and not self.methods:
            raise ValueError("objectives or methods must name at least one, got none")
        unknown = [name for name in self.baselines if name not in self.selections]
        if unknown:
            raise ValueError(f"baselines must be among {', '.join(self.selections)}, got {unknown[0]!r}")
        for method in self.all_methods:
            unknown = [name for name in method.selections if name not in self.selections]
            if unknown:
                raise ValueError(f"methods must use selections among {', '.join(self.selections)}, got {unknown[0]!r}")
            unknown = [name for name in method.settings if name not in self.settings]
            if unknown:
                raise ValueError(f"methods must use settings among {', '.join(self.settings)}, got {unknown[0]!r}")
            if method.parameter != "lr" and method.values == list(self.lrs):
                raise ValueError(f"values of {method.parameter} must be given for objective {method.objective!r}")
            if len(method.values) != len(self.lrs):
                raise ValueError(
                    f"values of {method.objective!r} must be as many as lrs, {len(self.lrs)}, so that every method has "
                    f"an equal choice, got {len(method.values)}"
                )
        triples = Counter(
            (method.objective, name, setting)
            for method in self.all_methods for name in method.selections for setting in method.settings
        )  # fmt: skip
        twice = [f"{objective} on {name}" for (objective, name, _), count in triples.items() if count > 1]
        if twice:
            raise ValueError(f"methods must be given once each, got {twice[0]} twice")


def find_experiment(name: str) -> Path:
    """The YAML file of an experiment.

    Args:
        name: a path that ends in .yaml or .yml, or the name of a file in `experiments/` here or in the checkout.

    Raises:
        ValueError: there is none; says which there are.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"experiment must be an existing file, got {name!r}")
        return Path(name)
    folders = (Path(_FOLDER), Path(__file__).resolve().parents[2] / _FOLDER)
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml") if _is_experiment(path)})
    raise ValueError(f"experiment must be a YAML file or one of {', '.join(known) or 'none here'}, got {name!r}")


def read_experiment(path: str | Path) -> ExperimentConfig:
    """Read and check an experiment's YAML file.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ExperimentConfig)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    try:
        values = instantiate(parser.parse_path(str(path)))
    except ArgumentError as error:
        raise ValueError(f"experiment {str(path)!r} must be valid: {' '.join(str(error).split())}") from error
    return ExperimentConfig(**vars(values))


def _is_experiment(path: Path) -> bool:
    return "\nsettings:" in path.read_text(encoding="utf-8")
