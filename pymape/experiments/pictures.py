"""Pictures of an experiment for its page: gaps, relearning curves, and a closer look at one model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pymape.experiments.claims import learned_selection, mean_gaps
from pymape.experiments.evidence import SETS
from pymape.experiments.summaries import Outcome, group
from pymape.masks import ModuleMasks
from pymape.metrics import Predictions, RecordScores
from pymape.report import Figure, Section, evidence_section
from pymape.storage.runs import MASKS

__all__ = ["SavedEvidence", "example_sections", "gap_figures", "glance_figures", "relearning_figures"]

_DRAWN = 4  # selections in a picture
_PANELS = 3  # objectives


@dataclass(frozen=True)
class SavedEvidence:
    """The lines of an evidence file, and the folder of the experiment, which holds the scores of every record."""

    folder: Path
    rows: Sequence[Mapping[str, Any]]

    def of(self, setting: str, objective: str, selection: str = "") -> list[Mapping[str, Any]]:
        """The lines of one kind of model, a seed each."""
        wanted = (setting, objective, selection)
        return [row for row in self.rows if (row["setting"], row["objective"], row["selection"]) == wanted]

    def predictions(self, row: Mapping[str, Any]) -> dict[str, Predictions]:
        """What a model said about the records of every set."""
        folder = self.folder / row["scores"]
        return {name: RecordScores.load(folder / f"{name}.safetensors").predictions() for name in SETS}

    def masks(self, row: Mapping[str, Any]) -> ModuleMasks | None:
        """The heads and filters that were trained; None where it was something else."""
        path = self.folder / row["scores"] / MASKS
        return ModuleMasks.load(path) if path.exists() else None


def glance_figures(outcomes: Sequence[Outcome]) -> list[Figure]:
    """The mean gaps of every setting, where there are several."""
    gaps = mean_gaps(outcomes)
    if len(gaps) < 2 or find_spec("matplotlib") is None:
        return []
    from pymape.report.plots import dots

    caption = (
        "Mean gap to the retrained model, in points, on a logarithmic axis: of the original, of models with all "
        "parameters or with a learned mask's trained, and of a second retrained model. The line has the colour of "
        "the side that is closer to retraining. Left of the second retrained model a difference is chance."
    )
    return [Figure(dots(gaps, "mean gap to the retrained model (points)", ("masks", "everything")), caption)]


def gap_figures(outcome: Outcome, setting: str) -> list[Figure]:
    """Gaps of the objectives that are crossed with the first selections."""
    rows = [row for row in outcome.found["table"] if row["setting"] == setting and row["selection"]]
    selections = list(dict.fromkeys(row["selection"] for row in rows))[:_DRAWN]
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["selection"] in selections and row["gap"]["mean"] is not None:
            groups.setdefault(row["objective"], {})[row["selection"]] = row["gap"]["values"]
    groups = {name: series for name, series in groups.items() if list(series) == selections}
    if not groups or find_spec("matplotlib") is None:
        return []
    from pymape.report.plots import bars

    caption = "Mean gap to the retrained model by objective; bars are means, dots are seeds."
    caption += "" if len(selections) < _DRAWN else f" The first {_DRAWN} selections are drawn."
    levels = {
        row["objective"]: row["gap"]["mean"]
        for row in outcome.found["table"]
        if row["setting"] == setting and row["objective"] == "retrained again"
    }
    caption += " Dashed: a second retrained model, which only chance separates from the first." if levels else ""
    return [Figure(bars(groups, "mean gap (points)", levels), caption)]


def relearning_figures(outcome: Outcome, evidence: SavedEvidence, setting: str) -> list[Figure]:
    """How the forget set comes back, by objective: with everything trained, with the learned mask, and retrained."""
    curves = [row for row in evidence.rows if row["setting"] == setting and row["relearning"]]
    seen = group(curves, "objective", "selection")
    learned, selections = learned_selection(outcome.config), outcome.config["selections"]
    everything = next((name for name, selection in selections.items() if selection["kind"] == "everything"), None)
    objectives = [objective for objective, selection in seen if selection and selection == learned][:_PANELS]
    if not objectives or find_spec("matplotlib") is None:
        return []
    from pymape.report.plots import lines

    panels: dict[str, dict[str, list[float]]] = {}
    for objective in objectives:
        # In the colours of the closer look, where the unlearned model comes second.
        names = {
            "original": ("original", ""),
            f"trained: {learned}": (objective, learned),
            "retrained": ("retrained", ""),
            f"trained: {everything}": (objective, everything),
        }
        panels[f"{objective}: accuracy on the forget set (%)"] = {
            name: _mean([row["relearning"]["accuracy"] for row in seen[place]])
            for name, place in names.items()
            if place in seen
        }
    first = curves[0]["relearning"]
    counts = sorted({curve["relearning"]["records"] for curve in curves})
    trained = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    caption = (
        f"The relearning attack: every model is trained on {trained} of the records that it was to forget, "
        "and its accuracy on all of them is measured. Mean over the seeds. Trained: what unlearning had trained. The "
        "nearer a curve lies to the retrained model's, the less was left to build on."
    )
    return [Figure(lines(panels, "steps of training", places=first["steps"]), caption)]


def example_sections(outcome: Outcome, evidence: SavedEvidence, setting: str, title: str) -> list[Section]:
    """A closer look at the first model with learned masks, beside the original and the retrained one of its seed."""
    learned = learned_selection(outcome.config)
    objectives = [
        row["objective"] for row in evidence.rows if row["setting"] == setting and row["selection"] == learned
    ]
    if learned is None or not objectives or not (evidence.folder / evidence.rows[0]["scores"]).is_dir():
        return []
    row = evidence.of(setting, objectives[0], learned)[0]
    names = {"original": ("original", ""), "unlearned": (objectives[0], learned), "retrained": ("retrained", "")}
    models = {
        name: evidence.predictions(next(own for own in evidence.of(setting, *place) if own["seed"] == row["seed"]))
        for name, place in names.items()
    }
    text = (
        f"One of the models in the table above, as an example: the first seed ({row['seed']}), the first objective "
        f"({objectives[0]}) and the first learned selection ({learned}), at {row['parameter']} {row['value']:g}."
    )
    return [evidence_section(f"A closer look: {title}", text, evidence.masks(row), models)]


def _mean(curves: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]
