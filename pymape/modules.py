"""Gates on the heads and filters of Hugging Face models: `instrument`, `set_gates`, `restore`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from pymape.architectures import language_model
from pymape.backends import BACKENDS
from pymape.feed_forward import STATE, FilterState, GateState, bind, check_batch, filter_state, is_instrumented, unbind
from pymape.layers import gate_output, takes_triton
from pymape.model_layout import LayerModules, find_layers
from pymape.ops.masked_attention import masked_attention

if TYPE_CHECKING:
    from pymape.masks import ModuleMasks

__all__ = [
    "apply_masks",
    "gates",
    "instrument",
    "is_instrumented",
    "restore",
    "set_gates",
]

Model = TypeVar("Model", bound=nn.Module)
Gates = Tensor | Sequence[Tensor] | None
Attention = Callable[..., tuple[Tensor, Tensor | None]]  # as the Hugging Face attention interface has them

_PREFIX = "pymape_"


def instrument(model: Model, *, backend: str = "auto") -> Model:
    """Give every attention head and every feed-forward filter of a Hugging Face model a gate.

    attention output = sum_h m^H[l, h] O[l, h] W_O[:, h];  FFN output = sum_f m^F[l, f] a[l, f] W_out[:, f]

    The model is changed in place: the attention implementations "sdpa" and "eager" are replaced by ones that gate the
    heads; with any other, such as "flash_attention_2", and in models that do not call the attention interface, a hook
    does it at the input of W_O. The feed-forward method is rebound per instance. No parameter or buffer is added, and
    until `set_gates` is called, the original code runs. With attention dropout in training, or with eager attention,
    the model's own attention runs and the head gate follows it. An activation that `masked_ffn` does not know runs as
    the original operations followed by the gate.

    Args:
        model: a model of a supported family, plain or wrapped by PEFT.
        backend: `auto`, `cpu`, `cuda`, `triton` or `reference` (the original operations, then the gate: gates of one
            give the original outputs and gradients bit for bit).

    Returns:
        The same model.

    Raises:
        ValueError: unknown architecture, already instrumented, or a replaced feed-forward method.

    Source: the masked Transformer of MAPE-Unlearn (arXiv 2508.17233).
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if is_instrumented(model):
        raise ValueError("model is already instrumented; call pymape.restore(model) first")
    layers = find_layers(model)
    states = [filter_state(layer, backend) for layer in layers]
    in_attention = _gate_attention(model, layers[0].attention)
    for layer, state in zip(layers, states, strict=True):
        if in_attention:
            setattr(layer.attention, STATE, GateState(backend))
        else:
            setattr(layer.output, STATE, GateState(backend))
            layer.output.register_forward_pre_hook(_gate_input)
        state.instrumented = True
        bind(layer.ffn, state)
    return model


def restore(model: Model) -> Model:
    """Undo `instrument`: the original code runs again, bit for bit.

    Raises:
        ValueError: the model is not instrumented.
    """
    if not is_instrumented(model):
        raise ValueError("model is not instrumented")
    for module in model.modules():
        state = vars(module).get(STATE)
        if isinstance(state, FilterState) and state.fused_on:
            state.gate, state.backend, state.instrumented = None, "auto", False
        elif isinstance(state, FilterState):
            unbind(module, state)
        elif state is not None:
            delattr(module, STATE)
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _gate_input]:
                del hooks[key]
    if _implementation(model).startswith(_PREFIX):
        _set_implementation(model, _implementation(model).removeprefix(_PREFIX))
    return model


def set_gates(model: nn.Module, heads: Gates = None, filters: Gates = None) -> None:
    """Set the gates of an instrumented model.

    Args:
        model: an instrumented model.
        heads: floating [L, H], or one row per sample [B, L, H]; or a sequence of L tensors [H] or [B, H]. Gradients
            flow to it. None: heads are not gated, and the original code runs.
        filters: the same for filters, [L, F] or [B, L, F].

    Raises:
        ValueError: the model is not instrumented, shapes or dtypes do not fit, or gates that require grad meet
            reentrant gradient checkpointing, whose backward cannot reach them.
    """
    layers = _instrumented_layers(model)
    new = [
        *_per_layer("heads", heads, [layer.output for layer in layers], layers[0].heads),
        *_per_layer("filters", filters, [layer.ffn_out for layer in layers], layers[0].filters),
    ]
    if any(gate is not None and gate.requires_grad for gate in new) and _reentrant(model):
        raise ValueError("gates that require grad need gradient checkpointing with use_reentrant=False, got True")
    for state, gate in zip(_states(layers), new, strict=True):
        state.gate = gate


@contextmanager
def gates(model: nn.Module, heads: Gates = None, filters: Gates = None) -> Iterator[None]:
    """`set_gates` for the length of a `with` block; the previous gates come back afterwards."""
    states = _states(_instrumented_layers(model))
    before = [state.gate for state in states]
    set_gates(model, heads, filters)
    try:
        yield
    finally:
        for state, gate in zip(states, before, strict=True):
            state.gate = gate


def apply_masks(model: Model, masks: ModuleMasks) -> Model:
    """Switch the selected modules off: gate = 1 - mask. Instruments the model if it is not.

    Gates are no weights: `model.save_pretrained` saves the whole model, with nothing switched off.

    Args:
        model: the model that the masks were made for.
        masks: which heads and filters are selected (to train these alone is the work of `PartialParameters`).

    Returns:
        The same model, instrumented.

    Raises:
        ValueError: masks of another model.
    """
    masks.check_model(model)
    if not is_instrumented(model):
        instrument(model)
    set_gates(model, 1 - masks.heads.float(), 1 - masks.filters.float())
    return model


def _gate_attention(model: nn.Module, attention: nn.Module | None) -> bool:
    """Choose the attention implementation that gates what the model's own computes, if there is one."""
    base = _implementation(model).removeprefix(_PREFIX)  # a config that models share may carry the prefix already
    if attention is None or base not in ("sdpa", "eager") or (base == "eager" and _eager_function(attention) is None):
        return False
    _set_implementation(model, _PREFIX + base)
    return True


def _gate_input(output: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The hook of W_O where nothing in attention gates the heads; they come in side by side, [B, T, H * D]."""
    state: GateState | None = vars(output).get(STATE)
    if state is None or state.gate is None:
        return None
    check_batch(state.gate, args[0].shape[0])
    heads = args[0].unflatten(-1, (state.gate.shape[-1], -1))
    return gate_output(heads, state.gate, state.backend).flatten(-2), *args[1:]


def _gated_attention(
    base: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, then the head gate; or both in one Triton kernel. Heads come out as [B, T, H, D]."""
    state: GateState | None = getattr(module, STATE, None)  # cross-attention shares the config and has no gate
    if state is None or state.gate is None:
        return base(module, query, key, value, attention_mask, **kwargs)
    check_batch(state.gate, query.shape[0])
    if base is sdpa_attention_forward and takes_triton(state.backend, query) and _kernel_can(kwargs):
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        causal = causal and attention_mask is None and query.shape[2] > 1
        if causal:  # a static cache holds positions that no query may see yet
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        output = masked_attention(
            query,
            key,
            value,
            state.gate,
            attn_mask=attention_mask,
            is_causal=causal,
            scale=kwargs.get("scaling"),
            backend=state.backend,
        )
        return output.transpose(1, 2), None
    output, weights = base(module, query, key, value, attention_mask, **kwargs)
    return gate_output(output, state.gate, state.backend), weights


def _sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _gated_attention(sdpa_attention_forward, module, *args, **kwargs)


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _gated_attention(cast(Attention, _eager_function(module)), module, *args, **kwargs)


def _eager_function(module: nn.Module) -> Attention | None:
    """Eager attention has no entry in the interface: every modeling file defines its own, or calls none."""
    if getattr(module, "reorder_and_upcast_attn", False):
        return _gpt2_upcast_attention
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _gpt2_upcast_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    return module._upcast_and_reordered_attn(query, key, value, attention_mask)


def _kernel_can(kwargs: dict[str, Any]) -> bool:
    """Whether the attention call asks for nothing beyond what `masked_attention` computes."""
    return not kwargs.get("dropout") and all(kwargs.get(name) is None for name in ("position_bias", "softcap", "cache"))


def _instrumented_layers(model: nn.Module) -> list[LayerModules]:
    if not is_instrumented(model):
        raise ValueError("model must be instrumented: call pymape.instrument(model) first")
    layers = find_layers(model)
    if not all(_in_attention(layer) or STATE in vars(layer.output) for layer in layers):
        raise ValueError(
            "model must not be wrapped after pymape.instrument, got another W_O: restore it, wrap, instrument"
        )
    if _in_attention(layers[0]) and not _implementation(model).startswith(_PREFIX):
        raise ValueError(
            f"model must keep the attention implementation that pymape.instrument set, got {_implementation(model)!r}"
        )
    return layers


def _states(layers: list[LayerModules]) -> list[GateState]:
    """The heads' states of all layers, then the filters'."""
    heads = [layer.attention if _in_attention(layer) else layer.output for layer in layers]
    return [getattr(module, STATE) for module in (*heads, *(layer.ffn for layer in layers))]


def _in_attention(layer: LayerModules) -> bool:
    """Whether the heads' gate is kept by what calls the attention interface, not by W_O."""
    return layer.attention is not None and STATE in vars(layer.attention)


def _per_layer(name: str, gate: Gates, linears: Sequence[Any], width: int) -> Sequence[Tensor | None]:
    """One gate per layer, on the device of the linear layer that it stands before."""
    if gate is None:
        return [None] * len(linears)
    layers = len(linears)
    if isinstance(gate, Tensor):
        if gate.dim() not in (2, 3) or tuple(gate.shape[-2:]) != (layers, width):
            raise ValueError(
                f"{name} must have shape ({layers}, {width}) or (batch, {layers}, {width}), got {tuple(gate.shape)}"
            )
        gate = gate.unbind(-2)  # one node in the autograd graph, where indexing layer by layer would make L
    if len(gate) != layers:
        raise ValueError(f"{name} must have {layers} layers, got {len(gate)}")
    for one in gate:
        if one.dim() not in (1, 2) or one.shape[-1] != width:
            raise ValueError(f"{name} must have shape ({width},) or (batch, {width}) per layer, got {tuple(one.shape)}")
        if not one.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {one.dtype}")
    return [one.to(linear.weight.device) for one, linear in zip(gate, linears, strict=True)]


def _reentrant(model: nn.Module) -> bool:
    """Whether a layer is checkpointed by torch's reentrant variant, the default of `torch.utils.checkpoint`."""
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in checkpointed]
    return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions)


def _implementation(model: Any) -> str:
    inner: Any = language_model(model) or model
    return inner.config._attn_implementation


def _set_implementation(model: Any, name: str) -> None:
    inner: Any = language_model(model) or model
    inner.set_attn_implementation(name)


AttentionInterface.register(_PREFIX + "sdpa", _sdpa)
AttentionInterface.register(_PREFIX + "eager", _eager)
# Without these the model would make no mask for an implementation it does not know, and padding would be attended to.
AttentionMaskInterface.register(_PREFIX + "sdpa", sdpa_mask)
AttentionMaskInterface.register(_PREFIX + "eager", eager_mask)
