"""Models and options that `UnlearnTrainer` refuses, because they would lose or ignore what was asked for."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from pymape.masks import ModuleMasks
from pymape.objectives import Objective

__all__ = ["reject_adapters", "reject_ignored"]


def reject_adapters(model: Any) -> None:
    """Refuse what saves adapters alone, but not a plain model with PEFT's layers in it, which saves every weight."""
    wrapped = hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel)
    if wrapped or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "model must be plain, got a PEFT model, whose checkpoints would not hold the trained weights: "
            "merge_and_unload() it first"
        )


def reject_ignored(
    args: TrainingArguments, objective: Objective, masks: ModuleMasks | None, dropout: bool, options: dict[str, Any]
) -> None:
    """Refuse options that would have no effect, or a wrong one."""
    for name in ("model_init", "compute_loss_func"):
        if options.get(name) is not None:
            raise ValueError(f"{name} must be None, got one that the objective would replace")
    if args.label_smoothing_factor != 0:
        raise ValueError(f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}")
    if getattr(args, "train_sampling_strategy", "random") != "random":
        raise ValueError(f"train_sampling_strategy must be 'random', got {args.train_sampling_strategy!r}")
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
    if checkpointing and masks is not None and passed_on and chosen.get("use_reentrant") is not False:
        raise ValueError(f"activation_checkpointing_kwargs must have use_reentrant=False with masks, got {chosen}")
    if args.n_gpu > 1:
        raise ValueError(f"one process must use one GPU (start with torchrun), got {args.n_gpu}")
