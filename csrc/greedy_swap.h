// greedy_swap: exchanges selected for unselected modules, layer by layer, until J(S) = 1/2 1_S^T Q 1_S - linear^T 1_S stops
// growing, with Q = G_f^T G_f / N_f - lam G_r^T G_r / N_r; or rearranges them in one pass over G_f (Kwon et al. 2022).
#pragma once

#include "tensor_view.h"

#ifdef PYMAPE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace pymape {

enum class SwapMode { swap, rearrange };

struct GreedySwapOutputs {
  TensorView mask;    // [L, M] bool, the masks to start from, replaced by the result
  TensorView before;  // [L] f64
  TensorView after;   // [L] f64
  TensorView swaps;   // [L] i64
};

// forget [N_f, L, M] and retain [N_r, L, M] (or null) of any strides and floating point dtype; linear [L, M] f64 contiguous
// (or null). The result does not depend on num_threads.
void greedy_swap(const TensorView& forget, const TensorView* retain, const TensorView* linear, double lam,
                 std::int64_t max_swaps, SwapMode mode, const GreedySwapOutputs& outputs, int num_threads);

#ifdef PYMAPE_CUDA
constexpr std::int64_t greedy_swap_workspace(std::int64_t modules, std::int64_t samples) { return 5 * modules + 2 * samples; }

// rows: [L, M, N] contiguous, f32 or f64, N a multiple of 16 bytes: in its columns the forget gradients, then the retain
// gradients, then zeros. workspace: [L, greedy_swap_workspace(M, N)] f64. All layers run in one launch, one block each.
void greedy_swap_cuda(const TensorView& rows, std::int64_t forget_samples, std::int64_t retain_samples,
                      const TensorView* linear, double lam, std::int64_t max_swaps, SwapMode mode,
                      const GreedySwapOutputs& outputs, const TensorView& workspace, cudaStream_t stream);
#endif

}  // namespace pymape
