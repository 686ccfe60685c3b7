"""The live shards of an S3T system as one model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from pymape.forward import on_device, unlabelled
from pymape.losses import task_of
from pymape.metrics.classification import Predictions
from pymape.metrics.forward import model_batches, task_logits
from pymape.metrics.scores import record_scores
from pymape.s3t.adapters import PEFT_PREFIX, layers_per_slice
from pymape.s3t.config import Combination, S3TConfig
from pymape.s3t.frozen_base import load_base
from pymape.s3t.shared_forward import SharedForward

if TYPE_CHECKING:
    from pymape.s3t.served import ServedStages

__all__ = [
    "LANGUAGE_TASKS",
    "Chain",
    "Combination",
    "Ensemble",
    "EnsembleOutput",
    "live_chains",
    "merge_chain",
    "shard_weights",
]

Chain = Sequence[Mapping[str, Tensor]]  # the tensors of a shard's served stages, root first

LANGUAGE_TASKS = ("causal language model", "masked language model")  # their head is frozen
_LORA = re.compile(re.escape(PEFT_PREFIX) + r"(.+)\.lora_([AB])\.weight")


@dataclass
class EnsembleOutput(ModelOutput):
    """What an ensemble says about a batch.

    Args:
        logits: combined, [B, C], or [B, T, V] of language models, whose logits are log-probabilities.
        shard_logits: [S, B, ...] of each live shard, in the order of `Ensemble.shards`.
    """

    logits: Tensor | None = None
    shard_logits: Tensor | None = None


class Ensemble(nn.Module):
    """The live shards as one model for inference, called like a Hugging Face model.

    All shards are answered for by one forward pass (`SharedForward`): the layers below a shard's adapters are computed
    once for all shards that have none there.

    In fp32 on the CPU a shard's logits are those of `PeftModel.from_pretrained` on its export up to the rounding of
    torch's own kernels, which depends on how many rows there are: the adapters' part and the order of operations are
    PEFT's, bit for bit.

    One thread at a time may call it. That of `S3T.ensemble` has a `source`: it never answers with a stage that a
    request had tombstoned before the call. One made of chains alone serves them until `update`, whatever is deleted.

    Args:
        model: the frozen base, or its folder. Its weights are shared, not copied; its modules stay as they are.
        config: of the system.
        chains: shard -> tensors of its served stages, root first; a shard without stages is dead and has no say.
        combination: of the shards' answers. "mean": of logits, of token probabilities for language models; "size": the
            same, weighted by `sizes`; "vote": the class that most shards prefer, the lowest on ties. Votes become
            probabilities by the rule of succession, (votes + 1) / (shards + classes), so that none is zero.
        sizes: shard -> number of records that its served stages were trained on, for "size".
        source: that the chains and sizes were read from, and will be read from again when it has changed.

    Attributes:
        shards: the live shards, ascending; none once all are dead.
        weights: what each of them counts for; they sum to one.

    Raises:
        ValueError: no live shard, a base model that is not plain, or chains that do not fit the base.

    Source: S3T (arXiv 2406.16257), inference.
    """

    shards: tuple[int, ...]
    weights: tuple[float, ...]

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        config: S3TConfig,
        chains: Mapping[int, Chain],
        *,
        combination: Combination = "mean",
        sizes: Mapping[int, int] | None = None,
        source: ServedStages | None = None,
    ) -> None:
        super().__init__()
        if combination not in get_args(Combination):
            raise ValueError(f"combination must be one of {', '.join(get_args(Combination))}, got {combination!r}")
        base = model if isinstance(model, nn.Module) else load_base(model, config.labels)
        self._task = task_of(base)
        if self._task == "question answering":
            raise ValueError(f"model must give one tensor of logits, got a {type(base).__name__}")
        self._shared = SharedForward(base)
        self.config, self.combination = base.config, combination
        self._settings, self._source = config, source
        live_chains(chains)  # refuses to begin without a live shard
        self.update(chains, sizes=sizes)

    def update(self, chains: Mapping[int, Chain], *, sizes: Mapping[int, int] | None = None) -> None:
        """Serve other stages, after a deletion or a repair; the base stays where it is.

        Args:
            chains: as for `Ensemble`. Without a live shard nothing is served any more, and a call raises.
            sizes: as for `Ensemble`.

        Raises:
            ValueError: as `Ensemble`; what was served before is served still.
        """
        live = {shard: chains[shard] for shard in sorted(chains) if len(chains[shard])}
        weights = shard_weights(list(live), self.combination, sizes)
        for shard, chain in live.items():
            self._check(shard, chain)
        parts = {shard: _split(merge_chain(chain)) for shard, chain in live.items()}
        lora = self._settings.lora
        self._shared.serve(
            {shard: part[0] for shard, part in parts.items()},
            {shard: part[1] for shard, part in parts.items()},
            lora.alpha / (lora.r**0.5 if lora.rslora else lora.r),
        )
        self.shards, self.weights = tuple(live), tuple(weights)

    def refresh(self) -> None:
        """Serve what the source serves by now, and hold nothing else any more. Every call does so first.

        Raises:
            ValueError: every shard is dead, or a stage file is damaged. Nothing is served then; the next call reads
                again.
            OSError: a stage file cannot be read now; likewise.
        """
        if self._source is not None and self._source.changed():
            self.update({})
            served = self._source.read()
            self.update(served.chains, sizes=served.sizes)

    @torch.inference_mode()
    def forward(self, **inputs: Any) -> EnsembleOutput:
        """Answer a batch.

        Args:
            **inputs: of the base model's forward; labels are left out of it, an ensemble has no loss.

        Raises:
            ValueError: every shard is dead; or as `refresh`.
        """
        self.refresh()
        if not self.shards:
            raise ValueError("ensemble must serve a live shard, got none: every shard is dead")
        logits = self._shared(unlabelled(inputs))
        return EnsembleOutput(self._combined(logits), logits)

    def predict(self, data: Any, *, batch_size: int = 32, progress: bool | None = None) -> Predictions:
        """What the ensemble says about labelled records, as `pymape.metrics.predict` gives it for one model.

        Args:
            data: map-style data set of dicts with the model's inputs and `labels`; `id` is not handed to the model.
            batch_size: records per forward pass.
            progress: show a progress bar; default: on a terminal.

        Raises:
            ValueError: empty data, or labels that do not fit the task.
        """
        return record_scores(self, data, batch_size=batch_size, progress=progress).predictions()

    def score(self, data: Any, *, batch_size: int = 32) -> dict[str, Any]:
        """Accuracy of the ensemble and of every live shard, from one pass over the data.

        Args:
            data: as for `predict`.
            batch_size: records per forward pass.

        Returns:
            {"accuracy": in percent (of language models: mean share of right tokens), "shard_accuracy": {shard: same}}.

        Raises:
            ValueError: as `predict`.
        """
        self.refresh()
        served, parts = self.shards, self._shared.parts
        right = torch.zeros(1 + len(served), dtype=torch.float64)
        batches = model_batches(self, data, batch_size, None)
        for _, _, batch in batches:
            inputs = on_device(self, batch)
            outputs = self(**inputs)
            if self._shared.parts is not parts:  # other stages are served by now
                return self.score(data, batch_size=batch_size)
            for row, logits in enumerate((outputs.logits, *outputs.shard_logits)):
                found, labels, counts = task_logits(self._task, inputs, EnsembleOutput(logits))
                own = (found.argmax(-1) == labels).double().split(counts)
                right[row] += sum(share.mean().item() for share in own if len(share))
        whole, *shards = (100 * right / len(batches.positions)).tolist()
        return {"accuracy": whole, "shard_accuracy": dict(zip(served, shards, strict=True))}

    def get_base_model(self) -> Any:
        """The model that is run; its class tells the task."""
        return self._shared.model

    def train(self, mode: bool = True) -> Ensemble:
        """An ensemble stays in eval mode."""
        return super().train(False)

    def _combined(self, shard_logits: Tensor) -> Tensor:
        logits = shard_logits.to(torch.promote_types(shard_logits.dtype, torch.float32))
        if self.combination == "vote":
            votes = torch.zeros_like(logits[0])
            for own in logits:
                choice = own.argmax(-1, keepdim=True)
                votes.scatter_add_(-1, choice, torch.ones_like(choice, dtype=votes.dtype))
            return ((votes + 1) / (len(logits) + logits.shape[-1])).log()
        weights = logits.new_tensor(self.weights)
        if self._task not in LANGUAGE_TASKS:
            return (weights.view(-1, *[1] * (logits.dim() - 1)) * logits).sum(0)
        total = logits[0].log_softmax(-1) + weights[0].log()
        for own, weight in zip(logits[1:], weights[1:], strict=True):
            total = torch.logaddexp(total, own.log_softmax(-1) + weight.log())
        return total

    def _check(self, shard: int, chain: Chain) -> None:
        """Refuse a chain whose stages do not adapt their own layers, or whose last one lacks the task head."""
        total = self._shared.layers
        group = layers_per_slice(self._settings, total)
        for number, stage in enumerate(chain, start=1):
            found = set(self._shared.places(_split(stage)[0]).values())
            expected = set(range(total - number * group, total - (number - 1) * group))
            if found != expected:
                raise ValueError(
                    f"stage {number} of shard {shard} must adapt layers {sorted(expected)}, got {sorted(found)}"
                )
        model = self._shared.model
        body = {id(parameter) for parameter in model.base_model.parameters()}
        own = {} if self._task in LANGUAGE_TASKS else dict(model.named_parameters())
        head = {name: tuple(parameter.shape) for name, parameter in own.items() if id(parameter) not in body}
        brought = {name: tuple(tensor.shape) for name, tensor in _split(chain[-1])[1].items()}
        if brought != head:
            raise ValueError(f"last stage of shard {shard} must hold the task head {head}, got {brought}")


def live_chains(chains: Mapping[int, Chain]) -> dict[int, Chain]:
    """The chains with at least one stage, by rising shard.

    Raises:
        ValueError: there is none.
    """
    live = {shard: chains[shard] for shard in sorted(chains) if len(chains[shard])}
    if not live:
        raise ValueError(f"chains must hold a live shard, got {len(chains)}, all dead")
    return live


def merge_chain(chain: Chain) -> dict[str, Tensor]:
    """The tensors that are served of a chain: every stage's adapters and the last one's task head."""
    return {name: tensor for stage in chain for name, tensor in stage.items()}


def shard_weights(shards: Sequence[int], combination: Combination, sizes: Mapping[int, int] | None) -> list[float]:
    """What each live shard counts for; the weights sum to one.

    Raises:
        ValueError: "size" without a positive number of records for every live shard.
    """
    if combination != "size":
        return [1 / len(shards) for _ in shards]
    counts = [0 if sizes is None else sizes.get(shard, 0) for shard in shards]
    if any(count < 1 for count in counts):
        raise ValueError(f"sizes must hold the records of each live shard {list(shards)}, got {sizes}")
    return [count / sum(counts) for count in counts]


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Adapters and task head among tensors named as PEFT names them.

    Returns:
        Module name -> {"A": [r, in], "B": [out, r]}; and name -> tensor of the head. Names are the base model's.
    """
    lora: dict[str, dict[str, Tensor]] = {}
    head = {}
    for name, tensor in tensors.items():
        found = _LORA.fullmatch(name)
        if found is not None:
            lora.setdefault(found[1], {})[found[2]] = tensor
        else:
            head[name.removeprefix(PEFT_PREFIX)] = tensor
    return lora, head
