// module_scores: scores[b, m] = sum over t, d of output[b, t, m, d] * grad[b, t, m, d].
#pragma once

#include "tensor_view.h"

#ifdef PYMAPE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace pymape {

// output, grad: [B, T, M, D] of one dtype, the last dimension contiguous; scores: [B, M] contiguous, f64 for f64 inputs and
// f32 otherwise. The result does not depend on num_threads.
void module_scores(const TensorView& output, const TensorView& grad, const TensorView& scores, int num_threads);

#ifdef PYMAPE_CUDA
// workspace: [B, splits, M * D] of the dtype of scores; tokens are divided among the splits.
void module_scores_cuda(const TensorView& output, const TensorView& grad, const TensorView& scores,
                        const TensorView& workspace, cudaStream_t stream);
#endif

}  // namespace pymape
