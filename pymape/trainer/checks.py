"""What `UnlearnTrainer` refuses, because it would lose or ignore what was asked for, or compute something else."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import IntervalStrategy, PreTrainedModel, TrainingArguments

from pymape.losses import CLASSIFICATION, LANGUAGE_MODEL, QUESTION_ANSWERING, task_of
from pymape.masks import ModuleMasks
from pymape.objectives import Objective
from pymape.trainer.pairing import alternative_answer, check_set, checked_sets, holds_all

__all__ = [
    "check_choices",
    "check_loss",
    "check_weights",
    "needed_sets",
    "needed_unseen",
    "reject_ignored",
    "reject_wrapped",
]

_logger = logging.getLogger(__name__)


def reject_wrapped(model: Any, args: TrainingArguments, masks: ModuleMasks | None) -> None:
    """Refuse what saves adapters alone, or a model's weights by names that no plain model has.

    PEFT's layers inside a plain model pass without masks and checkpoints: whoever put them there may fold them in.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError("model must be plain, got one that torch.compile has wrapped: give its _orig_mod")
    wrapped = hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel)
    if wrapped or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "model must be plain, got a PEFT model, whose checkpoints would not hold the trained weights: "
            "merge_and_unload() it first"
        )
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None or not any(isinstance(module, tuners.BaseTunerLayer) for module in model.modules()):
        return
    if masks is not None or args.save_strategy != "no":
        raise ValueError(
            "model must be plain, got one with PEFT's layers in it, whose checkpoints no plain model could load: "
            "merge_and_unload() the PEFT model first"
        )
    _logger.warning("model has PEFT's layers in it: merge_and_unload() the PEFT model before you save this one")


def reject_ignored(
    args: TrainingArguments, objective: Objective, masks: ModuleMasks | None, dropout: bool, options: Mapping[str, Any]
) -> None:
    """Refuse options that would have no effect, or a wrong one."""
    for name in ("model_init", "compute_loss_func"):
        if options.get(name) is not None:
            raise ValueError(f"{name} must be None, got one that the objective would replace")
    if args.label_smoothing_factor != 0:
        raise ValueError(f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}")
    if getattr(args, "train_sampling_strategy", "random") != "random":
        raise ValueError(f"train_sampling_strategy must be 'random', got {args.train_sampling_strategy!r}")
    if objective.one_shot:
        for name, value, unused in (
            ("prefix_cache", options.get("prefix_cache"), None),
            ("eval_strategy", IntervalStrategy(args.eval_strategy).value, "no"),
            ("load_best_model_at_end", args.load_best_model_at_end, False),
        ):
            if value != unused:
                raise ValueError(f"{name} must be {unused} for {objective.name!r}, which takes no steps, got {value}")
    above = masks is not None and masks.lowest_layer not in (None, 0)
    if args.neftune_noise_alpha is not None and (above or not dropout or objective.one_shot):
        raise ValueError(
            "neftune_noise_alpha must be None where the embeddings stay in eval mode (masks that leave layer 0 alone, "
            f"dropout=False, or an objective that takes no steps), got {args.neftune_noise_alpha}"
        )
    optimizer = options.get("optimizer_cls_and_kwargs") or options.get("optimizers", (None, None))[0]
    if objective.optimizer is not None and optimizer is not None:
        raise ValueError(f"no optimizer may be given with objective {objective.name!r}, which brings its own, got one")
    if masks is not None and options.get("optimizers", (None, None))[0] is not None:
        raise ValueError("optimizers must hold no optimizer with masks (use optimizer_cls_and_kwargs), got one")
    checkpointing = getattr(args, "gradient_checkpointing", False) or getattr(args, "activation_checkpointing", False)
    if checkpointing and not dropout:
        raise ValueError("dropout must be True with gradient checkpointing, which works in train mode only, got False")
    renamed = getattr(args, "activation_checkpointing_kwargs", None)  # within transformers 5
    chosen = renamed or getattr(args, "gradient_checkpointing_kwargs", None) or {}
    passed_on = chosen.keys() - {"every_n_layers", "offload"}  # to torch, whose default is reentrant
    asks = "masks" if masks is not None else f"objective {objective.name!r}" if objective.optimizer else None
    if checkpointing and asks is not None and passed_on and chosen.get("use_reentrant") is not False:
        raise ValueError(f"activation_checkpointing_kwargs must have use_reentrant=False with {asks}, got {chosen}")
    if args.n_gpu > 1:
        raise ValueError(f"one process must use one GPU (start with torchrun), got {args.n_gpu}")


def check_weights(alpha: float, beta: float, gamma: float) -> None:
    """Refuse weights that are out of range."""
    for name, value, lowest in (("alpha", alpha, 0.0), ("beta", beta, None), ("gamma", gamma, None)):
        if not (value > 0 or value == lowest) or value == float("inf"):
            raise ValueError(f"{name} must be finite and {'> 0' if lowest is None else '>= 0'}, got {value}")


def needed_sets(objective: Objective, forget: Any, retain: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The sets that the objective reads, and their records' ids; what is given is checked in any case."""
    data, ids = checked_sets(forget, retain)
    needs = {"forget": "required" if objective.forget else "unused", "retain": objective.retain}
    for side, need in needs.items():
        if need == "required" and side not in data:
            raise ValueError(f"{side}_dataset must be given for objective {objective.name!r}, got None")
    used = [side for side in data if needs[side] != "unused"]
    return {side: data[side] for side in used}, {side: ids[side] for side in used}


def needed_unseen(objective: Objective, unseen: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """The unseen records by the name of their set, where the objective needs them; not all of them those of `data`."""
    if not objective.needs_unseen:
        if unseen is not None:
            raise ValueError(f"unseen_dataset must be None for objective {objective.name!r}, got one")
        return {}
    if unseen is None:
        raise ValueError(f"unseen_dataset must be given for objective {objective.name!r}, got None")
    check_set("unseen_dataset", unseen)
    if holds_all(unseen, *data.values()):
        raise ValueError(f"unseen_dataset must hold records of its own, got {len(unseen)} to forget or retain")
    return {"unseen": unseen}


def check_choices(objective: Objective, retain: str, data: Mapping[str, Any], model: Any) -> None:
    """Refuse a retain term that the objective would ignore, and a model or records without what is needed."""
    objective.check_retain(retain)
    if retain == "kl" and "retain" not in data:
        raise ValueError("retain_dataset must be given for retain='kl', got None")
    task = task_of(model)
    problem = model.config.problem_type or ("regression" if model.config.num_labels == 1 else None)
    kind = problem if task == CLASSIFICATION else task
    compares = retain == "kl" or "log_probs" in objective.reference or objective.optimizer is not None
    if compares and kind in ("regression", "multi_label_classification", QUESTION_ANSWERING):
        what = "retain='kl'" if retain == "kl" else f"objective {objective.name!r}"
        raise ValueError(f"model must tell classes or tokens apart for {what}, got one for {kind}")
    if objective.alternative:
        answer = alternative_answer(data["forget"][0])
        if task == LANGUAGE_MODEL and "input_ids" not in answer:
            raise ValueError(
                "forget records must have alternative_input_ids beside alternative_labels for a causal language "
                f"model, got {sorted(data['forget'][0])}"
            )


def check_loss(objective: Objective, loss: Any) -> None:
    """Refuse what an objective has returned, unless it is a scalar with a gradient."""
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"objective {objective.name!r} must return a scalar tensor, got {got}")
    if not loss.requires_grad:
        raise ValueError(f"objective {objective.name!r} must return a loss with a gradient, got a constant")
