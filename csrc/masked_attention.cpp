#include "masked_attention.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "half.h"

namespace pymape {
namespace {

constexpr std::int64_t kTokenBlock = 64;   // tokens of one task; fixed, so that sums do not depend on the threads
constexpr std::int64_t kHeadBlock = 128;   // heads whose accumulators one task keeps
constexpr std::int64_t kLanes = 16;        // accumulators of one head: a sum that vectorises without reordering
constexpr std::int64_t kSerial = 1 << 15;  // below so many elements threads cost more than they save

// A block of tokens and heads of one sample. Strides in elements; the head dimension has stride 1.
template <typename T>
struct Block {
  T* data;
  std::int64_t token_stride, head_stride;
};

struct Extent {
  std::int64_t tokens, heads, width;
};

#define PYMAPE_GATE_BLOCK(T, ACC)                                                                                     \
  PYMAPE_MULTIVERSION void gate_block(Block<const T> in, const ACC* gate, std::int64_t gate_stride, Block<T> out,    \
                                      Extent n) {                                                                    \
    for (std::int64_t t = 0; t < n.tokens; ++t) {                                                                    \
      for (std::int64_t h = 0; h < n.heads; ++h) {                                                                   \
        const ACC m = gate[h * gate_stride];                                                                         \
        const T* __restrict__ x = in.data + t * in.token_stride + h * in.head_stride;                                \
        T* __restrict__ y = out.data + t * out.token_stride + h * out.head_stride;                                   \
        for (std::int64_t d = 0; d < n.width; ++d) y[d] = static_cast<T>(static_cast<ACC>(x[d]) * m);                \
      }                                                                                                              \
    }                                                                                                                \
  }

// partial[h] = sum over the block's tokens and d of grad * output; d_output = grad * gate.
#define PYMAPE_GATE_BLOCK_BACKWARD(T, ACC)                                                                            \
  PYMAPE_MULTIVERSION void gate_block_backward(Block<const T> grad, Block<const T> output, const ACC* gate,          \
                                               std::int64_t gate_stride, Block<T> d_output, ACC* partial, Extent n) { \
    alignas(64) ACC sums[kHeadBlock][kLanes];                                                                        \
    for (std::int64_t h = 0; h < n.heads; ++h)                                                                       \
      for (std::int64_t lane = 0; lane < kLanes; ++lane) sums[h][lane] = 0;                                          \
    for (std::int64_t t = 0; t < n.tokens; ++t) {                                                                    \
      for (std::int64_t h = 0; h < n.heads; ++h) {                                                                   \
        const ACC m = gate[h * gate_stride];                                                                         \
        const T* __restrict__ g = grad.data + t * grad.token_stride + h * grad.head_stride;                          \
        const T* __restrict__ o = output.data + t * output.token_stride + h * output.head_stride;                    \
        T* __restrict__ out = d_output.data + t * d_output.token_stride + h * d_output.head_stride;                  \
        ACC* __restrict__ sum = sums[h];                                                                             \
        std::int64_t d = 0;                                                                                          \
        for (; d + kLanes <= n.width; d += kLanes) {                                                                 \
          for (std::int64_t lane = 0; lane < kLanes; ++lane) {                                                       \
            const ACC value = static_cast<ACC>(g[d + lane]);                                                         \
            sum[lane] += value * static_cast<ACC>(o[d + lane]);                                                      \
            out[d + lane] = static_cast<T>(value * m);                                                               \
          }                                                                                                          \
        }                                                                                                            \
        for (; d < n.width; ++d) {                                                                                   \
          const ACC value = static_cast<ACC>(g[d]);                                                                  \
          sum[d % kLanes] += value * static_cast<ACC>(o[d]);                                                         \
          out[d] = static_cast<T>(value * m);                                                                        \
        }                                                                                                            \
      }                                                                                                              \
    }                                                                                                                \
    for (std::int64_t h = 0; h < n.heads; ++h) {                                                                     \
      ACC total = 0;                                                                                                 \
      for (std::int64_t lane = 0; lane < kLanes; ++lane) total += sums[h][lane];                                     \
      partial[h] = total;                                                                                            \
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
Block<T> block_of(const TensorView& x, std::int64_t b, std::int64_t t, std::int64_t h) {
  return {x.as<T>() + b * x.strides[0] + t * x.strides[1] + h * x.strides[2], x.strides[1], x.strides[2]};
}

template <typename T, typename ACC>
void forward(const TensorView& output, const TensorView& gate, const TensorView& result, int num_threads) {
  const auto [batch, tokens, heads, width] =
      std::array{output.shape[0], output.shape[1], output.shape[2], output.shape[3]};
  const std::int64_t blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
  const int threads = output.numel() < kSerial ? 1 : num_threads;

#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t first = block * kTokenBlock;
      gate_block(block_of<const T>(output, b, first, 0), gate.as<const ACC>() + b * gate.strides[0], gate.strides[1],
                 block_of<T>(result, b, first, 0), {std::min(kTokenBlock, tokens - first), heads, width});
    }
  }
}

template <typename T, typename ACC>
void backward(const TensorView& grad, const TensorView& output, const TensorView& gate, const TensorView& d_output,
              const TensorView& scores, int num_threads) {
  const auto [batch, tokens, heads, width] =
      std::array{output.shape[0], output.shape[1], output.shape[2], output.shape[3]};
  const std::int64_t blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
  const int threads = output.numel() < kSerial ? 1 : num_threads;
  std::vector<ACC> partial(static_cast<std::size_t>(batch * blocks * heads));  // [B, blocks, H]

#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t first = block * kTokenBlock;
      for (std::int64_t h = 0; h < heads; h += kHeadBlock) {
        gate_block_backward(block_of<const T>(grad, b, first, h), block_of<const T>(output, b, first, h),
                            gate.as<const ACC>() + b * gate.strides[0] + h * gate.strides[1], gate.strides[1],
                            block_of<T>(d_output, b, first, h), partial.data() + (b * blocks + block) * heads + h,
                            {std::min(kTokenBlock, tokens - first), std::min(kHeadBlock, heads - h), width});
      }
    }
  }
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      double sum = 0;
      for (std::int64_t block = 0; block < blocks; ++block) sum += partial[(b * blocks + block) * heads + h];
      scores.as<ACC>()[b * heads + h] = static_cast<ACC>(sum);
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
