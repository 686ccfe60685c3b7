"""What the command's configuration files and flags hold."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from pymape.errors import check_ranges
from pymape.metrics.generation import TEMPLATE
from pymape.objectives import get_objective
from pymape.search import Mode, Objective

__all__ = [
    "DataConfig",
    "DemoConfig",
    "EvaluateConfig",
    "MaskConfig",
    "QuestionsConfig",
    "RelearnConfig",
    "TrainConfig",
    "UnlearnConfig",
    "check_config",
]

UnlearnObjective = Literal[
    "ga", "gd", "match", "match_tokens", "kl", "npo", "simnpo", "dpo", "idk", "rmu", "ft", "l1_sparse", "rl", "so",
    "influence", "ssd",
]  # fmt: skip
# Those that need neither options nor alternative answers nor unseen records.
DemoObjective = Literal["ga", "gd", "kl", "npo", "simnpo", "ft", "rl", "so", "influence"]
MaskObjective = Literal[Objective, "everything"]


@dataclass
class _Options:
    """Options that may be given as paths and are kept as texts: what a run writes down of them is JSON."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
            elif isinstance(value, list):
                setattr(self, name, [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value])


@dataclass
class DataConfig(_Options):
    """Local data: csv, tsv, json, jsonl or parquet files whose records have ids.

    Args:
        path: records that the model was trained on.
        forget: ids to forget: a text file, one id per line, or a table with the id column.
        retain: ids to keep, in the same form; default: every record that is not forgotten.
        test: records the model has never seen, for the test accuracy and the membership attack.
        unseen: records the model has never seen, of the kind of those to forget: "match" gives the records
            to forget the losses of these, `stop_when_forgotten` waits for it. Do not give the test records: they
            measure the result.
        id_column: column of unique ids.
        text_column: column of the text.
        text_pair_column: column of a second text (premise and hypothesis and the like).
        label_column: column of the labels of a classifier; ignored by language models.
        alternative_column: column of what "dpo" and "idk" teach instead: another label, or another whole text for
            language models; may be empty where a record is not forgotten.
        max_length: tokens a text is cut to, no more than a model with learned positions can read.
        importance_samples: most retain records that the masks are learned from, drawn with the seed; 0 means all.
    """

    path: str
    forget: str | None = None
    retain: str | None = None
    test: str | None = None
    unseen: str | None = None
    id_column: str = "id"
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    alternative_column: str | None = None
    max_length: int = 128
    importance_samples: int = 2000


@dataclass
class MaskConfig(_Options):
    """How the masks are learned.

    Args:
        budget: share of the heads' and filters' parameters that may be trained, in (0, 1].
        objective: what the masks maximise; "everything" selects all modules, the module-oblivious baseline.
        lam: weight of the retain set in "difference".
        mode: "greedy" (warm start and best swaps), "warm" (warm start only) or "rearrange" (one pass).
        normalize: count every layer's heads, and every layer's filters, alike.
        across_layers: let modules of different layers trade places.
        first_order: keep the first-order term of the loss.
        max_swaps: most swaps per layer and kind.
        file: masks learned before, used instead of learning them.
    """

    budget: float = 0.3
    objective: MaskObjective = "difference"
    lam: float = 1.0
    mode: Mode = "greedy"
    normalize: bool = True
    across_layers: bool = False
    first_order: bool = False
    max_swaps: int = 400
    file: str | None = None

    def search_options(self) -> dict[str, Any]:
        """What `pymape.search` takes of these."""
        return {name: getattr(self, name) for name in vars(self) if name != "file"}


@dataclass
class TrainConfig:
    """Fine-tuning before the unlearning, and of the retrained model.

    Args:
        lr: peak learning rate, with linear decay.
        epochs: passes over the data.
        batch_size: records per step.
        weight_decay: of AdamW.
        group_by_length: put records of about one length into a batch, which saves padding.
    """

    lr: float = 5e-5
    epochs: float = 3.0
    batch_size: int = 32
    weight_decay: float = 0.01
    group_by_length: bool = False


@dataclass
class UnlearnConfig(_Options):
    """One unlearning run.

    Args:
        model: Hugging Face model folder with its tokenizer.
        data: the records, and which of them to forget.
        output: folder to write; new, empty, or an earlier run's, which is replaced. A session has its own folder.
        objective: the unlearning loss.
        objective_options: values for its own options, for instance {"layer": 7} for "rmu".
        lr: learning rate of the unlearning.
        epochs: passes over the longer of the sets that the objective reads (forget, retain).
        batch_size: forget records per step, and as many retain records.
        alpha: weight of the retain term.
        retain: the retain term of objectives that leave the choice: "nll", or "kl" from the original model.
        beta: inverse temperature of "npo", "simnpo" and "dpo".
        gamma: what "influence" adds to the curvature.
        weight_decay: of AdamW, on the selected parameters.
        train_task_head: also train the task head, which no mask selects.
        masks: how the masks are learned.
        stop_when_forgotten: end the unlearning once the loss on the forget records has reached that on `data.unseen`,
            looked at every ten steps and after the last.
        prefix_cache: folder for the hidden states below the lowest layer that the masks select (not layer 0), so that
            they are computed once for every record; those of the forget records are erased when these are forgotten.
        train_first: fine-tune the model on all data before unlearning; this is how a plain encoder gets its task head.
        train: settings of that fine-tuning.
        compare_retrain: also retrain from the same start without the forget set and report the gap (needs train_first).
        eval_batch_size: records per forward pass where nothing is trained.
        seed: of every random choice.
        session: folder of successive requests: the first one starts it from `model` and `data`, later ones continue
            from the last weights, with the same options unless they are given anew.
        request_id: name of the request in the session; a finished one is not repeated, its receipt is shown again.
        receipt_ids: how a session's receipts name records: "keyed" (HMAC-SHA256 with the session's own key) or "plain".
    """

    model: str
    data: DataConfig
    output: str = "runs/unlearn"
    objective: UnlearnObjective = "gd"
    objective_options: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-4
    epochs: float = 1.0
    batch_size: int = 32
    alpha: float = 1.0
    retain: Literal["nll", "kl"] = "nll"
    beta: float = 0.1
    gamma: float = 1e-3
    weight_decay: float = 0.0
    train_task_head: bool = False
    masks: MaskConfig = field(default_factory=MaskConfig)
    stop_when_forgotten: bool = False
    prefix_cache: str | None = None
    train_first: bool = False
    train: TrainConfig = field(default_factory=TrainConfig)
    compare_retrain: bool = False
    eval_batch_size: int = 64
    seed: int = 0
    session: str | None = None
    request_id: str | None = None
    receipt_ids: Literal["keyed", "plain"] = "keyed"


@dataclass
class QuestionsConfig(_Options):
    """Questions in TOFU's form, for language models: files with columns question, answer and perturbed_answer (a list).

    Args:
        forget: questions about what was to be forgotten, with a column paraphrased_answer.
        retain: questions about what was to be kept, with a column paraphrased_answer.
        real_authors: questions about real authors.
        world_facts: questions about the world.
        template: text of a question with its answer, as the model was trained with.
        max_new_tokens: most tokens of the model's own answer, which ROUGE judges; 0 leaves ROUGE out.
    """

    forget: str | None = None
    retain: str | None = None
    real_authors: str | None = None
    world_facts: str | None = None
    template: str = TEMPLATE
    max_new_tokens: int = 200


@dataclass
class RelearnConfig:
    """The relearning attack, on a copy of the model.

    Args:
        steps: optimizer steps; 0 leaves the attack out.
        lr: learning rate.
        share: share of the forget set to fine-tune on, in (0, 1].
        batch_size: records per step.
        tolerance: percentage points below the original model's accuracy that count as relearned.
        every: steps between two measurements.
    """

    steps: int = 0
    lr: float = 5e-5
    share: float = 0.1
    batch_size: int = 8
    tolerance: float = 5.0
    every: int = 1


@dataclass
class EvaluateConfig(_Options):
    """One evaluation of an unlearned model.

    Args:
        model: Hugging Face model folder with its tokenizer: the unlearned model.
        data: the records that the original model was trained on, which of them were to be forgotten, and unseen ones
            for the attacks.
        output: folder to write; new, empty, or an earlier run's, which is replaced.
        retrained: folder of the model retrained without the forget set: adds the gap, PrivLeak, forget quality and
            distances.
        original: folder of the model before unlearning: adds its figures; the relearning attack needs it.
        reference: folder of a model that has not seen the records, for the reference attack.
        shadows: folders of two or more classifiers that have seen neither the forget nor the test set, for the
            likelihood-ratio attack.
        gradients: also attack by gradient norms, one backward pass per record.
        k: share of the least likely tokens that Min-K and Min-K++ look at, in (0, 1].
        questions: questions in TOFU's form.
        relearn: the relearning attack.
        batch_size: records per forward pass.
        seed: of every random choice.
    """

    model: str
    data: DataConfig
    output: str = "runs/evaluate"
    retrained: str | None = None
    original: str | None = None
    reference: str | None = None
    shadows: list[str] = field(default_factory=list)
    gradients: bool = False
    k: float = 0.4
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    relearn: RelearnConfig = field(default_factory=RelearnConfig)
    batch_size: int = 64
    seed: int = 0


@dataclass
class DemoConfig(_Options):
    """The main job on scikit-learn's digits.

    Args:
        output: folder to write; new, empty, or an earlier run's, which is replaced.
        seeds: repetitions; from two on, means, spreads and paired differences are reported.
        first_seed: seed of the first repetition; the others follow.
        settings: what to forget: one whole class, or a random tenth of the training records.
        objectives: unlearning losses to compare.
        forget_class: the digit to forget in the class setting; default: the seed modulo 10.
        forget_share: share of the training records to forget in the random setting, in (0, 1).
        budget: share of the heads' and filters' parameters that may be trained, in (0, 1].
        class_lam: weight of the retain set in the objective of the masks, where a class is forgotten.
        random_lam: the same, where random records are.
        lrs: learning rates that masked and unmasked unlearning choose from.
        steps: optimizer steps of an unlearning run.
        batch_size: forget records per step, and as many retain records where the objective reads them.
        train_epochs: passes over the data when the original and the retrained model are trained.
    """

    output: str = "runs/demo"
    seeds: int = 1
    first_seed: int = 0
    settings: list[Literal["class", "random"]] = field(default_factory=lambda: ["class", "random"])
    objectives: list[DemoObjective] = field(default_factory=lambda: ["ga", "gd", "npo"])
    forget_class: int | None = None
    forget_share: float = 0.1
    budget: float = 0.3
    class_lam: float = 10.0
    random_lam: float = 1.0
    lrs: list[float] = field(default_factory=lambda: [2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3])
    steps: int = 30
    batch_size: int = 32
    train_epochs: int = 40


def check_config(config: UnlearnConfig) -> None:
    """Refuse options out of range.

    Raises:
        ValueError: naming the first one.
    """
    ranges = {
        "masks.budget": (config.masks.budget, 0 < config.masks.budget <= 1, "in (0, 1]"),
        "masks.lam": (config.masks.lam, 0 <= config.masks.lam < math.inf, "finite and not negative"),
        "masks.max_swaps": (config.masks.max_swaps, config.masks.max_swaps >= 0, "not negative"),
        "lr": (config.lr, 0 < config.lr < math.inf, "positive and finite"),
        "epochs": (config.epochs, 0 < config.epochs < math.inf, "positive and finite"),
        "batch_size": (config.batch_size, config.batch_size >= 1, "at least 1"),
        "eval_batch_size": (config.eval_batch_size, config.eval_batch_size >= 1, "at least 1"),
        "alpha": (config.alpha, 0 <= config.alpha < math.inf, "finite and not negative"),
        "beta": (config.beta, 0 < config.beta < math.inf, "positive and finite"),
        "gamma": (config.gamma, 0 < config.gamma < math.inf, "positive and finite"),
        "train.lr": (config.train.lr, 0 < config.train.lr < math.inf, "positive and finite"),
        "train.epochs": (config.train.epochs, 0 < config.train.epochs < math.inf, "positive and finite"),
        "train.batch_size": (config.train.batch_size, config.train.batch_size >= 1, "at least 1"),
        "data.max_length": (config.data.max_length, config.data.max_length >= 2, "at least 2"),
        "data.importance_samples": (
            config.data.importance_samples,
            config.data.importance_samples >= 0,
            "not negative",
        ),
    }
    check_ranges(ranges)
    if config.compare_retrain and not config.train_first:
        raise ValueError(
            "compare_retrain must come with train_first: true, so that both models start from the same weights, "
            "got train_first: false"
        )
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"the command must be run by one process, got WORLD_SIZE {processes}: see UnlearnTrainer for more"
        )
    if config.prefix_cache is not None and config.masks.objective == "everything" and config.masks.file is None:
        raise ValueError(
            "prefix_cache must come with masks that leave the first layer alone, got masks.objective 'everything'"
        )
    objective = get_objective(config.objective).with_options(config.objective_options)
    objective.check_retain(config.retain)
    for name in ("stop_when_forgotten", "prefix_cache"):
        value = getattr(config, name)
        if value and objective.one_shot:
            raise ValueError(f"{name} must be left out with {config.objective!r}, which takes no steps, got {value!r}")
    needs = "stop_when_forgotten" if config.stop_when_forgotten else f"objective {config.objective!r}"
    needed = config.stop_when_forgotten or objective.needs_unseen
    if needed and config.data.unseen is None:
        raise ValueError(f"data.unseen must be a file of records the model has never seen, for {needs}, got none")
    if not needed and config.data.unseen is not None:
        raise ValueError(
            f"data.unseen must be left out with {needs}, which reads none of it, got {config.data.unseen!r}: give "
            "stop_when_forgotten too, or objective 'match'"
        )
