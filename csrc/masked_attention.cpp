#include "masked_attention.h"

#include <omp.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "half.h"

namespace pymape {
namespace {

constexpr std::int64_t kTokenBlock = 64;   // tokens of one task; fixed, so that sums do not depend on the threads
constexpr std::int64_t kSerial = 1 << 15;  // below so many elements threads cost more than they save

// Tokens of one sample, and within each token spans of contiguous elements: all heads where these lie side by side, or one
// head each. Strides in elements.
template <typename T>
struct Block {
  T* data;
  std::int64_t token_stride, span_stride;
};

struct Extent {
  std::int64_t tokens, spans, length;
};

// out = in * factor, with one factor for every element of a token
#define PYMAPE_GATE_BLOCK(T, ACC)                                                                                     \
  PYMAPE_MULTIVERSION void gate_block(Block<const T> in, const ACC* factor, Block<T> out, Extent n) {                \
    for (std::int64_t t = 0; t < n.tokens; ++t) {                                                                    \
      for (std::int64_t span = 0; span < n.spans; ++span) {                                                          \
        const T* __restrict__ x = in.data + t * in.token_stride + span * in.span_stride;                             \
        const ACC* __restrict__ m = factor + span * n.length;                                                        \
        T* __restrict__ y = out.data + t * out.token_stride + span * out.span_stride;                                \
        for (std::int64_t i = 0; i < n.length; ++i) y[i] = static_cast<T>(static_cast<ACC>(x[i]) * m[i]);            \
      }                                                                                                              \
    }                                                                                                                \
  }

// d_output = grad * factor; sums = sum over the block's tokens of grad * output, for every element of a token. Two tokens at
// a time, so that a sum moves once for two products.
#define PYMAPE_GATE_BLOCK_BACKWARD(T, ACC)                                                                            \
  PYMAPE_MULTIVERSION void gate_block_backward(Block<const T> grad, Block<const T> output, const ACC* factor,        \
                                               Block<T> d_output, ACC* sums, Extent n) {                             \
    for (std::int64_t i = 0; i < n.spans * n.length; ++i) sums[i] = 0;                                               \
    for (std::int64_t span = 0; span < n.spans; ++span) {                                                            \
      const ACC* __restrict__ m = factor + span * n.length;                                                          \
      ACC* __restrict__ sum = sums + span * n.length;                                                                \
      std::int64_t t = 0;                                                                                            \
      for (; t + 2 <= n.tokens; t += 2) {                                                                            \
        const T* __restrict__ g0 = grad.data + t * grad.token_stride + span * grad.span_stride;                      \
        const T* __restrict__ o0 = output.data + t * output.token_stride + span * output.span_stride;                \
        T* __restrict__ d0 = d_output.data + t * d_output.token_stride + span * d_output.span_stride;                \
        const T *__restrict__ g1 = g0 + grad.token_stride, *__restrict__ o1 = o0 + output.token_stride;              \
        T* __restrict__ d1 = d0 + d_output.token_stride;                                                             \
        _Pragma("GCC ivdep") for (std::int64_t i = 0; i < n.length; ++i) {                                           \
          const ACC value0 = static_cast<ACC>(g0[i]), value1 = static_cast<ACC>(g1[i]);                              \
          sum[i] += value0 * static_cast<ACC>(o0[i]) + value1 * static_cast<ACC>(o1[i]);                             \
          d0[i] = static_cast<T>(value0 * m[i]);                                                                     \
          d1[i] = static_cast<T>(value1 * m[i]);                                                                     \
        }                                                                                                            \
      }                                                                                                              \
      for (; t < n.tokens; ++t) {                                                                                    \
        const T* __restrict__ g = grad.data + t * grad.token_stride + span * grad.span_stride;                       \
        const T* __restrict__ o = output.data + t * output.token_stride + span * output.span_stride;                 \
        T* __restrict__ d = d_output.data + t * d_output.token_stride + span * d_output.span_stride;                 \
        for (std::int64_t i = 0; i < n.length; ++i) {                                                                \
          const ACC value = static_cast<ACC>(g[i]);                                                                  \
          sum[i] += value * static_cast<ACC>(o[i]);                                                                  \
          d[i] = static_cast<T>(value * m[i]);                                                                       \
        }                                                                                                            \
      }                                                                                                              \
    }                                                                                                                \
  }

#define PYMAPE_LEAVES(T, ACC) \
  PYMAPE_GATE_BLOCK(T, ACC)   \
  PYMAPE_GATE_BLOCK_BACKWARD(T, ACC)

PYMAPE_LEAVES(double, double)
PYMAPE_LEAVES(float, float)
PYMAPE_LEAVES(BFloat16, float)
PYMAPE_LEAVES(Half, float)
#undef PYMAPE_LEAVES
#undef PYMAPE_GATE_BLOCK_BACKWARD
#undef PYMAPE_GATE_BLOCK

template <typename T>
Block<T> block_of(const TensorView& x, std::int64_t b, std::int64_t t) {
  return {x.as<T>() + b * x.strides[0] + t * x.strides[1], x.strides[1], x.strides[2]};
}

// Heads, and how a token's elements are swept in all of these tensors.
struct Grid {
  std::int64_t batch, tokens, heads, width, blocks;
  bool adjacent;
  int threads;

  Grid(std::initializer_list<const TensorView*> tensors, int num_threads) {
    const TensorView& first = **tensors.begin();
    batch = first.shape[0], tokens = first.shape[1], heads = first.shape[2], width = first.shape[3];
    blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
    adjacent = std::all_of(tensors.begin(), tensors.end(), [](const TensorView* x) { return x->strides[2] == x->shape[3]; });
    threads = first.numel() < kSerial ? 1 : num_threads;
  }
  Extent extent(std::int64_t block) const {
    const std::int64_t count = std::min(kTokenBlock, tokens - block * kTokenBlock);
    return adjacent ? Extent{count, 1, heads * width} : Extent{count, heads, width};
  }
};

// The gates of a sample, for every element of a token.
template <typename ACC>
void spread(const TensorView& gate, std::int64_t b, std::int64_t heads, std::int64_t width, ACC* factor) {
  for (std::int64_t h = 0; h < heads; ++h)
    std::fill_n(factor + h * width, width, gate.as<const ACC>()[b * gate.strides[0] + h * gate.strides[1]]);
}

template <typename T, typename ACC>
void forward(const TensorView& output, const TensorView& gate, const TensorView& result, int num_threads) {
  const Grid n({&output, &result}, num_threads);
#pragma omp parallel num_threads(n.threads)
  {
    std::vector<ACC> factor(static_cast<std::size_t>(n.heads * n.width));
#pragma omp for collapse(2) schedule(static)
    for (std::int64_t b = 0; b < n.batch; ++b) {
      for (std::int64_t block = 0; block < n.blocks; ++block) {
        spread(gate, b, n.heads, n.width, factor.data());
        const std::int64_t first = block * kTokenBlock;
        gate_block(block_of<const T>(output, b, first), factor.data(), block_of<T>(result, b, first), n.extent(block));
      }
    }
  }
}

template <typename T, typename ACC>
void backward(const TensorView& grad, const TensorView& output, const TensorView& gate, const TensorView& d_output,
              const TensorView& scores, int num_threads) {
  const Grid n({&grad, &output, &d_output}, num_threads);
  std::vector<double> partial(static_cast<std::size_t>(n.batch * n.blocks * n.heads));  // [B, blocks, H]
#pragma omp parallel num_threads(n.threads)
  {
    std::vector<ACC> factor(static_cast<std::size_t>(n.heads * n.width)), sums(factor.size());
#pragma omp for collapse(2) schedule(static)
    for (std::int64_t b = 0; b < n.batch; ++b) {
      for (std::int64_t block = 0; block < n.blocks; ++block) {
        spread(gate, b, n.heads, n.width, factor.data());
        const std::int64_t first = block * kTokenBlock;
        gate_block_backward(block_of<const T>(grad, b, first), block_of<const T>(output, b, first), factor.data(),
                            block_of<T>(d_output, b, first), sums.data(), n.extent(block));
        for (std::int64_t h = 0; h < n.heads; ++h) {
          double sum = 0;
          for (std::int64_t d = 0; d < n.width; ++d) sum += sums[h * n.width + d];
          partial[(b * n.blocks + block) * n.heads + h] = sum;
        }
      }
    }
  }
  for (std::int64_t b = 0; b < n.batch; ++b) {
    for (std::int64_t h = 0; h < n.heads; ++h) {
      double sum = 0;
      for (std::int64_t block = 0; block < n.blocks; ++block) sum += partial[(b * n.blocks + block) * n.heads + h];
      scores.as<ACC>()[b * n.heads + h] = static_cast<ACC>(sum);
    }
  }
}

}  // namespace

void gate_heads(const TensorView& output, const TensorView& gate, const TensorView& result, int num_threads) {
  switch (output.dtype) {
    case DType::f64: return forward<double, double>(output, gate, result, num_threads);
    case DType::f32: return forward<float, float>(output, gate, result, num_threads);
    case DType::bf16: return forward<BFloat16, float>(output, gate, result, num_threads);
    case DType::f16: return forward<Half, float>(output, gate, result, num_threads);
    default: throw std::invalid_argument("gate_heads takes floating point tensors");
  }
}

void gate_heads_backward(const TensorView& grad, const TensorView& output, const TensorView& gate,
                         const TensorView& d_output, const TensorView& scores, int num_threads) {
  switch (output.dtype) {
    case DType::f64: return backward<double, double>(grad, output, gate, d_output, scores, num_threads);
    case DType::f32: return backward<float, float>(grad, output, gate, d_output, scores, num_threads);
    case DType::bf16: return backward<BFloat16, float>(grad, output, gate, d_output, scores, num_threads);
    case DType::f16: return backward<Half, float>(grad, output, gate, d_output, scores, num_threads);
    default: throw std::invalid_argument("gate_heads_backward takes floating point tensors");
  }
}

}  // namespace pymape
