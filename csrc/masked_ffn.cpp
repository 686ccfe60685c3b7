#include "masked_ffn.h"

#include <omp.h>

#include <algorithm>
#include <memory>
#include <type_traits>

#include "half.h"

namespace pymape {
namespace {

constexpr std::int64_t kColumns = 512;         // filters that one call of a leaf sweeps, small enough for the first-level cache
constexpr std::int64_t kTokenBlock = 32;       // tokens of one task; fixed, so that sums do not depend on the threads
constexpr std::int64_t kSerial = 1 << 15;      // below so many elements threads cost more than they save
constexpr std::int64_t kSerialSums = 1 << 20;  // the same for the additions that join the blocks' sums

// Neighbouring filters of one token.
template <typename ACC>
struct Row {
  std::int64_t columns;
  const ACC *pre, *up, *grad, *bias, *up_bias, *gate;
  ACC *out, *d_up, *scores;  // out is the result forward, d_pre backward
};

template <Activation A, bool GATED, typename ACC>
PYMAPE_INLINE void forward_row(const Row<ACC>& row) {
  const ACC *__restrict__ pre = row.pre, *__restrict__ up = row.up, *__restrict__ gate = row.gate;
  const ACC *__restrict__ bias = row.bias, *__restrict__ up_bias = row.up_bias;
  ACC* __restrict__ out = row.out;
#pragma GCC ivdep  // the rows are distinct: no run-time overlap tests, of which GCC allows few
  for (std::int64_t f = 0; f < row.columns; ++f) {
    ACC value = activate<A>(pre[f] + bias[f]);
    if constexpr (GATED) value *= up[f] + up_bias[f];
    out[f] = value * gate[f];
  }
}

template <Activation A, bool GATED, typename ACC>
PYMAPE_INLINE void backward_row(const Row<ACC>& row) {
  const ACC *__restrict__ pre = row.pre, *__restrict__ up = row.up, *__restrict__ gate = row.gate;
  const ACC *__restrict__ bias = row.bias, *__restrict__ up_bias = row.up_bias, *__restrict__ grad = row.grad;
  ACC *__restrict__ d_pre = row.out, *__restrict__ d_up = row.d_up, *__restrict__ scores = row.scores;
#pragma GCC ivdep
  for (std::int64_t f = 0; f < row.columns; ++f) {
    ACC value, slope;
    activate_with_slope<A>(pre[f] + bias[f], value, slope);
    const ACC gated = grad[f] * gate[f];
    if constexpr (GATED) {
      const ACC u = up[f] + up_bias[f];
      scores[f] += grad[f] * (value * u);
      d_pre[f] = gated * u * slope;
      d_up[f] = gated * value;
    } else {
      scores[f] += grad[f] * value;
      d_pre[f] = gated * slope;
    }
  }
}

// Multiversioning needs plain functions: one overload per type, which switches to the inlined loop.
#define PYMAPE_CASE(LOOP, A) \
  case Activation::A: return row.up ? LOOP<Activation::A, true>(row) : LOOP<Activation::A, false>(row);
#define PYMAPE_LEAF(NAME, LOOP, ACC)                                             \
  PYMAPE_MULTIVERSION void NAME(const Row<ACC>& row, Activation activation) {    \
    switch (activation) {                                                        \
      PYMAPE_CASE(LOOP, gelu)                                                    \
      PYMAPE_CASE(LOOP, gelu_tanh)                                               \
      PYMAPE_CASE(LOOP, relu)                                                    \
      PYMAPE_CASE(LOOP, silu)                                                    \
    }                                                                            \
  }
#define PYMAPE_CONVERT(T)                                                                            \
  PYMAPE_MULTIVERSION void widen(const T* __restrict__ from, float* __restrict__ to, std::int64_t n) {  \
    for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);                        \
  }                                                                                                  \
  PYMAPE_MULTIVERSION void narrow(const float* __restrict__ from, T* __restrict__ to, std::int64_t n) { \
    for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);                            \
  }

PYMAPE_LEAF(forward_leaf, forward_row, float)
PYMAPE_LEAF(forward_leaf, forward_row, double)
PYMAPE_LEAF(backward_leaf, backward_row, float)
PYMAPE_LEAF(backward_leaf, backward_row, double)
PYMAPE_CONVERT(BFloat16)
PYMAPE_CONVERT(Half)
#undef PYMAPE_CONVERT
#undef PYMAPE_LEAF
#undef PYMAPE_CASE

// A thread's own rows: vectors for what the caller left out, sinks for what nobody wants, room to convert 16-bit rows.
template <typename ACC>
struct Scratch {
  alignas(64) ACC zeros[kColumns], ones[kColumns], scores[kColumns];
  alignas(64) ACC pre[kColumns], up[kColumns], grad[kColumns], out[kColumns], d_up[kColumns];

  Scratch() {
    std::fill_n(zeros, kColumns, ACC(0));
    std::fill_n(ones, kColumns, ACC(1));
  }
};

// One tensor's token rows, read or written in the kernel's accumulator type.
template <typename T, typename ACC>
struct Rows {
  T* data = nullptr;
  std::int64_t stride = 0;
  ACC* buffer = nullptr;

  Rows(const OptionalView& view, std::int64_t b, std::int64_t t, ACC* buffer) : buffer(buffer) {
    if (!view) return;
    data = view->as<T>() + b * view->strides[0] + t * view->strides[1];
    stride = view->strides[1];
  }
  const ACC* read(std::int64_t t, std::int64_t f, std::int64_t columns) const {
    if (!data) return nullptr;
    if constexpr (std::is_same_v<T, ACC>) {
      return data + t * stride + f;
    } else {
      widen(data + t * stride + f, buffer, columns);
      return buffer;
    }
  }
  ACC* target(std::int64_t t, std::int64_t f) const {
    if constexpr (std::is_same_v<T, ACC>) {
      if (data) return data + t * stride + f;
    }
    return buffer;
  }
  // Asks for the next filters while these are computed: without it, memory and arithmetic take turns.
  template <int WRITE>
  void prefetch(std::int64_t t, std::int64_t f) const {
    if (!data) return;
    const char* next = reinterpret_cast<const char*>(data + t * stride + f + kColumns);
    for (std::size_t i = 0; i < kColumns * sizeof(T); i += 64) __builtin_prefetch(next + i, WRITE);
  }
  void written(std::int64_t t, std::int64_t f, std::int64_t columns) const {
    if constexpr (!std::is_same_v<T, ACC>) {
      if (data) narrow(buffer, data + t * stride + f, columns);
    }
  }
};

template <typename ACC>
Row<ACC> vectors_of(const ActivationInput& in, std::int64_t b, std::int64_t f, const Scratch<ACC>& scratch) {
  Row<ACC> row{};
  row.columns = std::min(kColumns, in.pre.shape[2] - f);
  row.bias = in.bias ? in.bias->as<ACC>() + f : scratch.zeros;
  row.up_bias = in.up_bias ? in.up_bias->as<ACC>() + f : scratch.zeros;
  row.gate = in.gate ? in.gate->as<ACC>() + b * in.gate->strides[0] + f : scratch.ones;
  return row;
}

struct Grid {
  std::int64_t batch, tokens, filters, blocks;
  int threads;

  Grid(const TensorView& pre, int num_threads)
      : batch(pre.shape[0]), tokens(pre.shape[1]), filters(pre.shape[2]),
        blocks((tokens + kTokenBlock - 1) / kTokenBlock), threads(pre.numel() < kSerial ? 1 : num_threads) {}
};

template <typename T, typename ACC>
void forward(const ActivationInput& in, const TensorView& result, int num_threads) {
  const Grid n(in.pre, num_threads);
#pragma omp parallel num_threads(n.threads)
  {
    Scratch<ACC> scratch;
#pragma omp for collapse(2) schedule(static)
    for (std::int64_t b = 0; b < n.batch; ++b) {
      for (std::int64_t block = 0; block < n.blocks; ++block) {
        const std::int64_t first = block * kTokenBlock, count = std::min(kTokenBlock, n.tokens - first);
        const Rows<T, ACC> pre(in.pre, b, first, scratch.pre), up(in.up, b, first, scratch.up);
        const Rows<T, ACC> out(result, b, first, scratch.out);
        for (std::int64_t t = 0; t < count; ++t) {
          for (std::int64_t f = 0; f < n.filters; f += kColumns) {
            Row<ACC> row = vectors_of(in, b, f, scratch);
            row.pre = pre.read(t, f, row.columns);
            row.up = up.read(t, f, row.columns);
            row.out = out.target(t, f);
            pre.template prefetch<0>(t, f);
            up.template prefetch<0>(t, f);
            out.template prefetch<1>(t, f);
            forward_leaf(row, in.activation);
            out.written(t, f, row.columns);
          }
        }
      }
    }
  }
}

// scores[group, f] = sum of the group's partial sums, in their order.
template <typename ACC>
void fold(const ACC* partial, std::int64_t blocks, const TensorView& scores, int num_threads) {
  const std::int64_t groups = scores.shape[0], filters = scores.shape[1];
  const int threads = blocks * scores.numel() < kSerialSums ? 1 : num_threads;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (std::int64_t group = 0; group < groups; ++group) {
    for (std::int64_t first = 0; first < filters; first += kColumns) {
      const std::int64_t last = std::min(filters, first + kColumns);
      ACC* total = scores.as<ACC>() + group * filters;
      std::fill(total + first, total + last, ACC(0));
      for (std::int64_t block = 0; block < blocks; ++block) {
        const ACC* row = partial + (group * blocks + block) * filters;
        for (std::int64_t f = first; f < last; ++f) total[f] += row[f];
      }
    }
  }
}

template <typename T, typename ACC>
void backward(const TensorView& grad, const ActivationInput& in, const ActivationGradients& out, int num_threads) {
  const Grid n(in.pre, num_threads);
  std::unique_ptr<ACC[]> partial;  // [B, blocks, F]
  if (out.scores) partial = std::make_unique_for_overwrite<ACC[]>(n.batch * n.blocks * n.filters);

#pragma omp parallel num_threads(n.threads)
  {
    Scratch<ACC> scratch;
#pragma omp for collapse(2) schedule(static)
    for (std::int64_t b = 0; b < n.batch; ++b) {
      for (std::int64_t block = 0; block < n.blocks; ++block) {
        const std::int64_t first = block * kTokenBlock, count = std::min(kTokenBlock, n.tokens - first);
        const Rows<T, ACC> pre(in.pre, b, first, scratch.pre), up(in.up, b, first, scratch.up);
        const Rows<T, ACC> upstream(grad, b, first, scratch.grad);
        const Rows<T, ACC> d_pre(out.d_pre, b, first, scratch.out), d_up(out.d_up, b, first, scratch.d_up);
        ACC* scores = out.scores ? partial.get() + (b * n.blocks + block) * n.filters : nullptr;
        if (scores) std::fill_n(scores, n.filters, ACC(0));
        for (std::int64_t t = 0; t < count; ++t) {
          for (std::int64_t f = 0; f < n.filters; f += kColumns) {
            Row<ACC> row = vectors_of(in, b, f, scratch);
            row.pre = pre.read(t, f, row.columns);
            row.up = up.read(t, f, row.columns);
            row.grad = upstream.read(t, f, row.columns);
            row.out = d_pre.target(t, f);
            row.d_up = d_up.target(t, f);
            row.scores = scores ? scores + f : scratch.scores;
            pre.template prefetch<0>(t, f);
            up.template prefetch<0>(t, f);
            upstream.template prefetch<0>(t, f);
            d_pre.template prefetch<1>(t, f);
            d_up.template prefetch<1>(t, f);
            backward_leaf(row, in.activation);
            d_pre.written(t, f, row.columns);
            d_up.written(t, f, row.columns);
          }
        }
      }
    }
  }
  if (out.scores) {
    const std::int64_t samples = out.scores->shape[0] == n.batch ? 1 : n.batch;
    fold<ACC>(partial.get(), samples * n.blocks, *out.scores, n.threads);
  }
}

}  // namespace

void masked_activation(const ActivationInput& in, const TensorView& result, int num_threads) {
  switch (in.pre.dtype) {
    case DType::f64: return forward<double, double>(in, result, num_threads);
    case DType::f32: return forward<float, float>(in, result, num_threads);
    case DType::bf16: return forward<BFloat16, float>(in, result, num_threads);
    case DType::f16: return forward<Half, float>(in, result, num_threads);
    default: throw std::invalid_argument("masked_activation takes floating point tensors");
  }
}

void masked_activation_backward(const TensorView& grad, const ActivationInput& in, const ActivationGradients& out,
                                int num_threads) {
  switch (in.pre.dtype) {
    case DType::f64: return backward<double, double>(grad, in, out, num_threads);
    case DType::f32: return backward<float, float>(grad, in, out, num_threads);
    case DType::bf16: return backward<BFloat16, float>(grad, in, out, num_threads);
    case DType::f16: return backward<Half, float>(grad, in, out, num_threads);
    default: throw std::invalid_argument("masked_activation_backward takes floating point tensors");
  }
}

}  // namespace pymape
