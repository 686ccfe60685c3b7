"""The layers whose shapes the operators are measured at."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DECODERS", "ENCODERS", "LAYERS", "LayerShape"]


@dataclass(frozen=True)
class LayerShape:
    """One Transformer layer and the batch it is measured with."""

    width: int
    heads: int
    kv_heads: int
    filters: int
    activation: str  # of `ACTIVATIONS`
    gated: bool  # with an up projection
    causal: bool
    batch: tuple[int, int]  # samples, tokens, on a GPU
    cpu_batch: tuple[int, int]  # the same where two cores have to do it in a fraction of a second

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def compiled_on_cpu(self) -> bool:
        """Whether torch.compile is a contender on a CPU too: it compiles for ten seconds, so one layer has to do."""
        return self is LAYERS["BERT-base"]

    def samples_and_tokens(self, device: str) -> tuple[int, int]:
        return self.cpu_batch if device == "cpu" else self.batch


LAYERS = {
    "BERT-base": LayerShape(768, 12, 12, 3072, "gelu", False, False, (64, 128), (16, 128)),
    "RoBERTa-large": LayerShape(1024, 16, 16, 4096, "gelu", False, False, (32, 512), (8, 128)),
    "ViT-B/16": LayerShape(768, 12, 12, 3072, "gelu", False, False, (64, 197), (8, 197)),
    "GPT-2": LayerShape(768, 12, 12, 3072, "gelu_tanh", False, True, (16, 1024), (2, 512)),
    "Llama-3-8B": LayerShape(4096, 32, 8, 14336, "silu", True, True, (2, 2048), (1, 128)),
}
ENCODERS = tuple(name for name, layer in LAYERS.items() if not layer.causal)
DECODERS = tuple(name for name, layer in LAYERS.items() if layer.causal)
