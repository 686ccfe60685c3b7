#include "module_scores.h"

#include <omp.h>

#include <algorithm>

#include "half.h"

namespace pymape {
namespace {

constexpr std::int64_t kLanes = 3072;       // accumulators of one task: they stay in the first-level cache
constexpr std::int64_t kTokenBlock = 64;    // products summed in one run before they join the total: bounds rounding

// total[lane] = sum over tokens of a[t, lane] * b[t, lane], summed block by block. Two tokens at a time, whole rows of them:
// each accumulator moves once for two products, and four long streams are what the prefetchers follow best.
#define PYMAPE_SUM_TOKENS(NAME, T, ACC)                                                                              \
  PYMAPE_MULTIVERSION void NAME(const T* __restrict__ a, const T* __restrict__ b, std::int64_t stride_a,             \
                                std::int64_t stride_b, std::int64_t tokens, std::int64_t lanes,                      \
                                ACC* __restrict__ block, ACC* __restrict__ total) {                                  \
    for (std::int64_t lane = 0; lane < lanes; ++lane) total[lane] = 0;                                               \
    for (std::int64_t first = 0; first < tokens; first += kTokenBlock) {                                             \
      const std::int64_t last = std::min(tokens, first + kTokenBlock);                                               \
      for (std::int64_t lane = 0; lane < lanes; ++lane) block[lane] = 0;                                             \
      std::int64_t t = first;                                                                                        \
      for (; t + 2 <= last; t += 2) {                                                                                \
        const T *__restrict__ a0 = a + t * stride_a, *__restrict__ a1 = a0 + stride_a;                               \
        const T *__restrict__ b0 = b + t * stride_b, *__restrict__ b1 = b0 + stride_b;                               \
        for (std::int64_t lane = 0; lane < lanes; ++lane)                                                            \
          block[lane] += ACC(a0[lane]) * ACC(b0[lane]) + ACC(a1[lane]) * ACC(b1[lane]);                              \
      }                                                                                                              \
      for (; t < last; ++t)                                                                                          \
        for (std::int64_t lane = 0; lane < lanes; ++lane)                                                            \
          block[lane] += ACC(a[t * stride_a + lane]) * ACC(b[t * stride_b + lane]);                                  \
      for (std::int64_t lane = 0; lane < lanes; ++lane) total[lane] += block[lane];                                  \
    }                                                                                                                \
  }

PYMAPE_SUM_TOKENS(sum_tokens, double, double)
PYMAPE_SUM_TOKENS(sum_tokens, float, float)
PYMAPE_SUM_TOKENS(sum_tokens, BFloat16, float)
PYMAPE_SUM_TOKENS(sum_tokens, Half, float)
#undef PYMAPE_SUM_TOKENS

// Sum of n values in place, halving: the error grows with log n.
template <typename ACC>
ACC fold(ACC* values, std::int64_t n) {
  if (n == 0) return 0;
  for (; n > 1; n = (n + 1) / 2)
    for (std::int64_t i = 0; i < n / 2; ++i) values[i] += values[(n + 1) / 2 + i];
  return values[0];
}

template <typename T, typename ACC>
void run(const TensorView& output, const TensorView& grad, const TensorView& scores, int num_threads) {
  const std::int64_t batch = output.shape[0], tokens = output.shape[1];
  const std::int64_t modules = output.shape[2], width = output.shape[3];
  // Modules that lie side by side in both tensors are swept together, as many as one task's accumulators hold.
  const bool adjacent = output.strides[2] == width && grad.strides[2] == width;
  const std::int64_t group = adjacent ? std::max<std::int64_t>(1, kLanes / std::max<std::int64_t>(width, 1)) : 1;
  const std::int64_t groups = (modules + group - 1) / group;

#pragma omp parallel num_threads(num_threads)
  {
    alignas(64) ACC block[kLanes], total[kLanes];
#pragma omp for collapse(2) schedule(static)
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t g = 0; g < groups; ++g) {
        const std::int64_t first = g * group, last = std::min(modules, first + group);
        const T* a = output.as<T>() + b * output.strides[0] + first * output.strides[2];
        const T* c = grad.as<T>() + b * grad.strides[0] + first * grad.strides[2];
        ACC* out = scores.as<ACC>() + b * modules;
        if (width <= kLanes) {
          sum_tokens(a, c, output.strides[1], grad.strides[1], tokens, (last - first) * width, block, total);
          for (std::int64_t m = first; m < last; ++m) out[m] = fold(total + (m - first) * width, width);
        } else {  // one module, swept piece by piece
          out[first] = 0;
          for (std::int64_t offset = 0; offset < width; offset += kLanes) {
            const std::int64_t lanes = std::min(kLanes, width - offset);
            sum_tokens(a + offset, c + offset, output.strides[1], grad.strides[1], tokens, lanes, block, total);
            out[first] += fold(total, lanes);
          }
        }
      }
    }
  }
}

}  // namespace

void module_scores(const TensorView& output, const TensorView& grad, const TensorView& scores, int num_threads) {
  switch (output.dtype) {
    case DType::f64: return run<double, double>(output, grad, scores, num_threads);
    case DType::f32: return run<float, float>(output, grad, scores, num_threads);
    case DType::bf16: return run<BFloat16, float>(output, grad, scores, num_threads);
    case DType::f16: return run<Half, float>(output, grad, scores, num_threads);
    default: throw std::invalid_argument("module_scores takes floating point tensors");
  }
}

}  // namespace pymape
