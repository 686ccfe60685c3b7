"""One forward pass for several shards, which computes what they have in common only once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pymape.model_layout import find_layers
from pymape.ops.segmented_lora import segmented_lora

__all__ = ["Lora", "SharedForward"]

Lora = Mapping[str, Mapping[str, Tensor]]  # module name -> {"A": [r, in], "B": [out, r]}

_PLACE, _PART = "_s3t_place", "_s3t_part"  # what served modules carry, unseen by `named_modules`


class SharedForward(nn.Module):
    """A frozen base model that answers for several shards at once.

    A batch runs once through the layers below the lowest adapters. A shard gets rows of its own where its adapters
    begin; up to there it shares those of the bare base with every other shard that has none yet. All adapters of a
    linear layer are applied by one `segmented_lora`, and every shard's task head sees its own rows.

    Args:
        model: a plain Hugging Face model of a supported family. Its weights are shared; its modules stay as they are.

    Attributes:
        model: the same weights in modules of its own, in eval mode.
        parts: adapters and task heads that are served.
        layers: number of layers.

    Raises:
        ValueError: a model that is instrumented, has adapters, or is of no supported family.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = _own_modules(model)
        self.parts = nn.ModuleList()
        self._layers = [layer.layer for layer in find_layers(self.model)]
        self.layers = len(self._layers)
        self._options = {"use_cache": False} if "use_cache" in signature(self.model.forward).parameters else {}
        self._run = _Run()
        self._passes: list[_Pass] = []
        self._order: list[int] = []
        self._served: list[nn.Module] = []
        for index, layer in enumerate(self._layers):
            vars(layer)[_PLACE] = index, self._run
            vars(layer)["forward"] = MethodType(_layer_forward, layer)

    def places(self, names: Iterable[str]) -> dict[str, int]:
        """The layer that each of these modules lies in.

        Raises:
            ValueError: naming one that is in no layer.
        """
        layer_of = {module: index for index, layer in enumerate(self._layers) for module in layer.modules()}
        modules = dict(self.model.named_modules())
        found = {}
        for name in sorted(names):
            if name not in modules or modules[name] not in layer_of:
                raise ValueError(f"adapters must belong to modules in the base's layers, got some of {name!r}")
            found[name] = layer_of[modules[name]]
        return found

    def serve(self, lora: Mapping[int, Lora], heads: Mapping[int, Mapping[str, Tensor]], scale: float) -> None:
        """Answer for these shards from now on.

        Args:
            lora: shard -> its adapters, at least one each.
            heads: shard -> tensors of its task head by their name in the model; all of one kind, or empty.
            scale: of the adapters.

        Raises:
            ValueError: adapters that do not fit the base or one another; what was served before is served still.
        """
        places = self.places({name for modules in lora.values() for name in modules})
        passes = _plan({shard: min(places[name] for name in lora[shard]) for shard in lora}, self.layers)
        parts: dict[str, tuple[nn.Module, Callable[..., Tensor]]] = {}
        for name, place in places.items():
            step = next(step for step in passes if step.start <= place < step.stop)
            own = {shard: modules[name] for shard, modules in lora.items() if name in modules}
            adapters = _Adapters(name, self.model.get_submodule(name).weight, own, step.segments, scale)
            parts[name] = adapters, _adapted_forward
        last = [shard for shard in passes[-1].segments if shard is not None]  # all: the top layer is adapted
        for name in sorted({tensor.split(".")[0] for tensors in heads.values() for tensor in tensors}):
            copies = [_head(self.model.get_submodule(name), name, heads[shard]) for shard in last]
            parts[name] = nn.ModuleList(copies), _heads_forward

        for module in self._served:
            for attribute in (_PART, "forward"):
                del vars(module)[attribute]
        self._served = [self.model.get_submodule(name) for name in parts]
        for module, (part, forward) in zip(self._served, parts.values(), strict=True):
            vars(module)[_PART], vars(module)["forward"] = part, MethodType(forward, module)
        self.parts = nn.ModuleList(part.eval() for part, _ in parts.values())
        self._passes, self._order = passes, [last.index(shard) for shard in sorted(lora)]

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the logits of every shard, [S, B, ...] in ascending order of the shards.

        Args:
            inputs: keyword arguments of the model's forward, without labels.
        """
        rows = next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), None)
        if rows is None:
            raise ValueError(f"inputs must hold tensors, got {sorted(inputs)}")
        run, states = self._run, None
        for step in self._passes:
            if states is not None:
                states = states.unflatten(0, (-1, rows))[step.source].flatten(0, 1)
            run.start, run.stop, run.states = step.start, step.stop, states
            try:
                outputs = self.model(**_repeated(inputs, rows, len(step.segments)), **self._options)
            except _Reached as reached:
                states = reached.states
            finally:
                run.states = None
        return outputs.logits.unflatten(0, (-1, rows))[self._order]


@dataclass(frozen=True)
class _Pass:
    """A run through the layers from `start` up to `stop`, which is not run.

    Args:
        source: the segments of the pass before that the segments go on from.
        segments: the shards whose rows follow one another; None: rows of the bare base, which come last.
    """

    start: int
    stop: int
    source: list[int]
    segments: list[int | None]


@dataclass
class _Run:
    """Where the present pass begins and ends, and the states that enter it.

    `rest` is how much else a layer returns, of which nothing is used; it differs between versions of transformers.
    """

    start: int = 0
    stop: int = 0
    states: Tensor | None = None
    rest: int | None = None


class _Reached(Exception):
    """Carries the states that enter the layer where a pass stops out of the model."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class _Adapters(nn.Module):
    """The adapters of one linear layer, and which of them each segment meets.

    Args:
        name: of the layer, for messages.
        weight: of the layer, [out, in] or the transpose.
        own: shard -> its matrices.
        segments: the shards of the pass that runs the layer.
        scale: of the adapters.
    """

    a: Tensor
    b: Tensor

    def __init__(
        self, name: str, weight: Tensor, own: Mapping[int, Mapping[str, Tensor]], segments: Sequence[Any], scale: float
    ) -> None:
        super().__init__()
        shapes = {tuple((part, tuple(matrices[part].shape)) for part in sorted(matrices)) for matrices in own.values()}
        sizes = dict(next(iter(shapes)))
        if len(shapes) > 1 or set(sizes) != {"A", "B"} or sizes["A"][0] != sizes["B"][-1]:
            raise ValueError(f"adapters of {name!r} must be an A and a B of one rank for all shards, got {shapes}")
        if sorted((sizes["A"][-1], sizes["B"][0])) != sorted(weight.shape):
            raise ValueError(f"adapters of {name!r} must fit its weight {tuple(weight.shape)}, got {sizes}")
        for part in "AB":
            stack = torch.stack([matrices[part].detach() for matrices in own.values()])
            self.register_buffer(part.lower(), stack.to(weight.device))
        rows = {shard: row for row, shard in enumerate(own)}
        self.adapters = [rows.get(shard, -1) for shard in segments]
        self.scale = [scale] * len(own)

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        size = len(flat) // len(self.adapters)
        offsets = [size * edge for edge in range(len(self.adapters) + 1)]
        # PEFT computes in the adapters' dtype, too, and rounds the sum to the base's.
        flat, sums = flat.to(self.a.dtype), base.flatten(0, -2).to(self.a.dtype)
        return (
            segmented_lora(flat, sums, self.a, self.b, offsets, self.adapters, self.scale).to(base.dtype).view_as(base)
        )


def _plan(starts: Mapping[int, int], layers: int) -> list[_Pass]:
    """One pass from every layer where shards part from the bare base; the first begins with the embeddings."""
    order = sorted(starts, key=lambda shard: (starts[shard], shard))
    bounds = sorted({0, *starts.values()})
    passes: list[_Pass] = []
    for start, stop in zip(bounds, [*bounds[1:], layers], strict=True):
        segments: list[int | None] = [shard for shard in order if starts[shard] <= start]
        if len(segments) < len(order):
            segments.append(None)
        before = passes[-1].segments if passes else segments
        source = [before.index(shard) if shard in before else len(before) - 1 for shard in segments]
        passes.append(_Pass(start, stop, source, segments))
    return passes


def _own_modules(model: Any) -> Any:
    """The model in modules of its own, in eval mode, with the same weights."""
    marks = ("base_layer", "modules_to_save")  # PEFT's
    if any("forward" in vars(part) or any(hasattr(part, mark) for mark in marks) for part in model.modules()):
        raise ValueError(f"model must be plain, got a {type(model).__name__} that is instrumented or has adapters")
    shared: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        own = tensor.detach()
        shared[id(tensor)] = nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own
    return copy.deepcopy(model, shared).eval()


def _head(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a part of the task head with a shard's tensors."""
    device = next(module.parameters()).device
    own = copy.deepcopy(module)
    for attribute in (_PART, "forward"):  # of a module that is served already
        vars(own).pop(attribute, None)
    own.load_state_dict({key: tensors[f"{name}.{key}"].to(device) for key in own.state_dict()}, assign=True)
    return own.requires_grad_(False)


def _repeated(inputs: Mapping[str, Any], rows: int, times: int) -> dict[str, Any]:
    """Inputs with everything that has one entry a record repeated for every segment."""
    return {
        name: torch.cat([value] * times) if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
        for name, value in inputs.items()
    }


def _layer_forward(module: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What a layer's forward is rebound to."""
    index, run = vars(module)[_PLACE]
    if index < run.start:
        return run.states if run.rest is None else (run.states, *[None] * run.rest)
    if index == run.stop:
        raise _Reached(hidden_states)
    output = type(module).forward(module, hidden_states, *args, **kwargs)
    run.rest = len(output) - 1 if isinstance(output, tuple) else None
    return output


def _adapted_forward(module: nn.Module, x: Tensor) -> Tensor:
    """What the forward of a linear layer with adapters is rebound to."""
    return vars(module)[_PART](x, type(module).forward(module, x))


def _heads_forward(module: nn.Module, x: Tensor) -> Tensor:
    """What the forward of a part of the task head is rebound to: each shard's copy for its own rows."""
    heads = vars(module)[_PART]
    return torch.cat([head(own) for head, own in zip(heads, x.chunk(len(heads)), strict=True)])
