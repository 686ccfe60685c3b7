// The elementwise half of masked_ffn: bias + activation (times an up projection) + filter gate, and its backward.
#pragma once

#include <optional>

#include "activations.h"
#include "tensor_view.h"

#ifdef PYMAPE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace pymape {

using OptionalView = std::optional<TensorView>;

// pre, up: [B, T, F] of one dtype, the last dimension contiguous. bias, up_bias: [F]; gate: [B, F] with any stride over B (0 for
// a gate that all samples share); all three contiguous over F and of the accumulator dtype (f64 for f64, f32 otherwise).
struct ActivationInput {
  TensorView pre;
  OptionalView bias, up, up_bias, gate;
  Activation activation;
};

// result[b, t, f] = act(pre + bias) * (up + up_bias) * gate[b, f]; result: [B, T, F] contiguous.
void masked_activation(const ActivationInput& in, const TensorView& result, int num_threads);

// From one pass over grad, pre and up: d_pre, d_up ([B, T, F] contiguous) and scores, the sum over tokens of grad * act * up
// without the gate ([B, F], or [1, F]: summed over samples too). What is absent is not wanted. The results do not depend on
// num_threads.
struct ActivationGradients {
  OptionalView d_pre, d_up, scores;
};
void masked_activation_backward(const TensorView& grad, const ActivationInput& in, const ActivationGradients& out,
                                int num_threads);

#ifdef PYMAPE_CUDA
void masked_activation_cuda(const ActivationInput& in, const TensorView& result, cudaStream_t stream);

// workspace: [B, splits, F] contiguous of the dtype of scores, needed with scores; tokens are divided among the splits.
void masked_activation_backward_cuda(const TensorView& grad, const ActivationInput& in, const ActivationGradients& out,
                                     const OptionalView& workspace, cudaStream_t stream);
#endif

}  // namespace pymape
