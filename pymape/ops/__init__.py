"""The operators: one module each, with the public function, its plain torch reference and its registration."""

from pymape.ops.greedy_swap import GreedySwapResult, greedy_swap, greedy_swap_reference
from pymape.ops.masked_attention import gate_heads, gate_heads_reference, masked_attention, masked_attention_reference
from pymape.ops.masked_ffn import masked_activation, masked_activation_reference, masked_ffn, masked_ffn_reference
from pymape.ops.module_scores import module_scores, module_scores_reference
from pymape.ops.segmented_lora import segmented_lora, segmented_lora_reference
from pymape.ops.selected_weight_grad import selected_weight_grad, selected_weight_grad_reference
from pymape.ops.simulate_deletions import DeletionRuns, simulate_deletions, simulate_deletions_reference

__all__ = [
    "DeletionRuns",
    "GreedySwapResult",
    "gate_heads",
    "gate_heads_reference",
    "greedy_swap",
    "greedy_swap_reference",
    "masked_activation",
    "masked_activation_reference",
    "masked_attention",
    "masked_attention_reference",
    "masked_ffn",
    "masked_ffn_reference",
    "module_scores",
    "module_scores_reference",
    "segmented_lora",
    "segmented_lora_reference",
    "selected_weight_grad",
    "selected_weight_grad_reference",
    "simulate_deletions",
    "simulate_deletions_reference",
]
