"""The parts that every report of an unlearning run shares."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pymape.report.html import Figure, Section

if TYPE_CHECKING:
    from pymape.masks import ModuleMasks
    from pymape.metrics import Predictions

__all__ = ["evidence_section", "flat_settings", "run_facts"]


def evidence_section(
    title: str, text: str, masks: ModuleMasks | None, models: Mapping[str, Mapping[str, Predictions]]
) -> Section:
    """The masks, the losses and the attacked confidences of one unlearned model beside its reference models.

    Args:
        title: heading of the section.
        text: paragraph below it.
        masks: which modules were trained; None for all parameters.
        models: name of a model ("original", "unlearned", "retrained") to the predictions on its sets; "forget" and
            "retain" must be among the sets, "test" may be.

    Returns:
        A section with pictures, or with a sentence on how to get them where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return Section(title, f"{text} The pictures need matplotlib: pip install matplotlib.")
    from pymape.report.plots import histograms, mask_picture

    losses = {
        f"{name} set": {model: sets[name].loss for model, sets in models.items()} for name in ("forget", "retain")
    }
    confidences = {
        model: {name: sets[name].confidence for name in ("retain", "test", "forget") if name in sets}
        for model, sets in models.items()
    }
    figures = [
        Figure(
            histograms(losses, "loss (nats)", log=True),
            "Loss of every record before and after. Unlearning should lift the forget set's losses to where the "
            "retrained model has them (left) and leave the retain set's where they were (right).",
        ),
        Figure(
            histograms(confidences, "probability of the true class", log_shares=True),
            "What the membership attack sees: the probability each model gives the true class (the vertical axis is "
            "logarithmic). The attack learns to tell retain records (members) from test records (non-members) and is "
            "then asked about the forget set.",
        ),
    ]
    if masks is not None:
        caption = (
            "The learned masks: the heads and filters whose parameters were trained. Everything else is unchanged."
        )
        figures.insert(0, Figure(mask_picture(masks), caption))
    return Section(title, text, figures=figures)


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Options by the name of their flags, with values as text."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat[prefix + name] = ", ".join(map(str, value))
        else:
            flat[prefix + name] = "default" if value is None else str(value)
    return flat


def run_facts(environment: Mapping[str, Any]) -> dict[str, str]:
    """What `runs.environment` found, as text."""
    machine = environment["machine"]
    facts = {
        "date": environment["date"],
        "versions": ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        "commit": environment["commit"],
        "machine": f"{machine['system']} {machine['architecture']}, {machine['threads']} threads",
        "accelerator": machine["accelerator"],
    }
    return {name: value for name, value in facts.items() if value}
