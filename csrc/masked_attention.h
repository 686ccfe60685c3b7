// The head gate behind attention: gate_heads and its backward, which yields the head scores from the same pass.
#pragma once

#include "tensor_view.h"

#ifdef PYMAPE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace pymape {

// In all functions output, grad, result and d_output are [B, T, H, D] of one dtype with a contiguous last dimension; gate is
// [B, H] of the accumulator dtype (f64 for f64, f32 otherwise) with any strides, 0 for a gate that all samples share.

// result[b, t, h, d] = output[b, t, h, d] * gate[b, h]
void gate_heads(const TensorView& output, const TensorView& gate, const TensorView& result, int num_threads);

// d_output[b, t, h, d] = grad[b, t, h, d] * gate[b, h];  scores[b, h] = sum over t, d of grad[b, t, h, d] * output[b, t, h, d]
// scores: [B, H] contiguous of the accumulator dtype. They do not depend on num_threads.
void gate_heads_backward(const TensorView& grad, const TensorView& output, const TensorView& gate,
                         const TensorView& d_output, const TensorView& scores, int num_threads);

#ifdef PYMAPE_CUDA
void gate_heads_cuda(const TensorView& output, const TensorView& gate, const TensorView& result, cudaStream_t stream);

// workspace: [B, splits, H * D] contiguous of the dtype of scores; tokens are divided among the splits.
void gate_heads_backward_cuda(const TensorView& grad, const TensorView& output, const TensorView& gate,
                              const TensorView& d_output, const TensorView& scores, const TensorView& workspace,
                              cudaStream_t stream);
#endif

}  // namespace pymape
