"""Feed-forward blocks whose forward pass is replaced: gated by `modules`, fused for `PartialParameters`, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from torch import Tensor, nn

from pymape.backends import has_kernel
from pymape.layers import gate_filters, is_unhooked
from pymape.model_layout import LayerModules, activation_name
from pymape.ops.masked_activation import SUPPORTED, apply_gate, masked_activation

__all__ = [
    "STATE",
    "FilterState",
    "GateState",
    "bind",
    "check_batch",
    "filter_state",
    "fuse_ffn",
    "is_instrumented",
    "unbind",
    "unfuse_ffn",
]

STATE = "_pymape"  # the attribute of an instrumented module: a plain object, so that the state_dict stays as it is


@dataclass(eq=False)
class GateState:
    """What an instrumented attention module remembers."""

    backend: str
    gate: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> GateState:
        # A gate is often a view of a larger leaf, which torch cannot deepcopy; the copy starts from the same values.
        return replace(self, gate=None if self.gate is None else self.gate.detach().clone())


@dataclass(eq=False)
class FilterState(GateState):
    """The same for a feed-forward module, instrumented or fused, with its submodules by name.

    Names outlive deepcopy and LoRA wrapping.
    """

    method: str = "forward"
    activation: str | None = None
    linear_name: str = ""
    up_name: str | None = None
    fused_gate_up: bool = False
    activation_name: str = ""
    tail_names: tuple[str, ...] = ()
    instrumented: bool = False  # not only fused
    fused_on: tuple[str, ...] = ()  # devices on which the activation is fused even without a gate


def is_instrumented(model: nn.Module) -> bool:
    """Whether `instrument` has been called on the model."""
    states = (vars(module).get(STATE) for module in model.modules())
    return any(isinstance(state, FilterState) and state.instrumented for state in states)


def fuse_ffn(layers: Sequence[LayerModules], devices: tuple[str, ...]) -> None:
    """Fuse the activation of feed-forward blocks with the product behind it.

    Args:
        layers: with gated blocks, instrumented or not, that compute no more than their projections and this.
        devices: types of devices on which the activation is fused where `set_gates` has set no gate.
    """
    for layer in layers:
        state = vars(layer.ffn).get(STATE)
        if state is None and layer.row.ffn_method not in vars(layer.ffn):
            state = filter_state(layer, "auto")
        if state is not None and state.activation is not None:
            state.fused_on = devices
            bind(layer.ffn, state)


def unfuse_ffn(model: nn.Module) -> None:
    """Undo `fuse_ffn`."""
    instrumented = is_instrumented(model)
    for module in model.modules():
        state = vars(module).get(STATE)
        if isinstance(state, FilterState):
            state.fused_on = ()
            if not instrumented:
                unbind(module, state)


def bind(ffn: nn.Module, state: FilterState) -> None:
    """Replace the forward pass of a block by one that reads the state."""
    setattr(ffn, STATE, state)
    setattr(ffn, state.method, MethodType(_gated_ffn, ffn))


def unbind(ffn: nn.Module, state: FilterState) -> None:
    """Undo `bind`, unless somebody else has replaced the forward pass since."""
    vars(ffn).pop(STATE, None)
    if getattr(vars(ffn).get(state.method), "__func__", None) is _gated_ffn:
        delattr(ffn, state.method)


def filter_state(layer: LayerModules, backend: str) -> FilterState:
    before: FilterState | None = vars(layer.ffn).get(STATE)
    names = {module: name for name, module in layer.ffn.named_modules()}
    activation = layer.activation if is_unhooked(layer.ffn_activation) else None
    if activation is None and backend not in ("auto", "reference"):
        name = type(layer.ffn_activation).__name__
        raise ValueError(f"backend must be 'auto' or 'reference' for the activation {name}, got {backend!r}")
    if before is None and layer.row.ffn_method in vars(layer.ffn):
        raise ValueError(f"model must not have a replaced {layer.row.ffn_method} in {type(layer.ffn).__name__}")
    return FilterState(
        backend,
        method=layer.row.ffn_method,
        activation=activation,
        linear_name=names[layer.ffn_in],
        up_name=None if layer.ffn_up is None else names[layer.ffn_up],
        fused_gate_up=layer.row.fused_gate_up,
        activation_name=names[layer.ffn_activation],
        tail_names=tuple(names[module] for module in layer.ffn_tail),
        fused_on=() if before is None or activation is None else before.fused_on,
    )


def _gated_ffn(module: nn.Module, x: Tensor) -> Tensor:
    """What the feed-forward method is rebound to: filters, gate if any, and what the original does after them."""
    state: FilterState = getattr(module, STATE)
    kind = None if state.gate is not None else _fused_activation(module, state, x)
    if state.gate is None and kind is None:
        return getattr(type(module), state.method)(module, x)
    if state.gate is not None:
        check_batch(state.gate, x.shape[0])
    linear = module.get_submodule(state.linear_name)
    up = None if state.up_name is None else module.get_submodule(state.up_name)
    if kind is not None:
        pre, up_x = _projected(state, linear, up, x)
        hidden = masked_activation(pre, up=up_x, activation=kind)
    elif state.backend == "reference" or state.activation is None:
        pre, up_x = _projected(state, linear, up, x)
        hidden = module.get_submodule(state.activation_name)(pre)
        hidden = apply_gate(hidden if up_x is None else hidden * up_x, state.gate)
    elif state.fused_gate_up:
        pre, up_x = _projected(state, linear, up, x)
        hidden = masked_activation(pre, state.gate, up=up_x, activation=state.activation, backend=state.backend)
    else:
        hidden = gate_filters(linear, up, x, state.gate, state.activation, state.backend)
    for name in state.tail_names:
        hidden = module.get_submodule(name)(hidden)
    return hidden


def _projected(state: FilterState, linear: nn.Module, up: nn.Module | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the activation takes, and what it is multiplied by in a gated block."""
    if state.fused_gate_up:
        pre, up_x = linear(x).chunk(2, dim=-1)
        return pre, up_x
    return linear(x), None if up is None else up(x)


def _fused_activation(module: nn.Module, state: FilterState, x: Tensor) -> str | None:
    """The activation if it is to be fused here; it may have been hooked or replaced since `fuse_ffn`."""
    if x.device.type not in state.fused_on or not has_kernel(x.device, SUPPORTED):
        return None
    activation = module.get_submodule(state.activation_name)
    return activation_name(activation) if is_unhooked(activation) else None


def check_batch(gate: Tensor, batch: int) -> None:
    if gate.dim() == 2 and gate.shape[0] != batch:
        raise ValueError(
            f"per-sample gates must have one row per row of the batch ({batch}), got {gate.shape[0]}; "
            "beam search and the like, which repeat samples, need gates shared by all samples"
        )
