#include "masked_ffn.h"

#include <algorithm>
#include <type_traits>

#include "cuda_utils.cuh"

namespace pymape {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxGrid = 65535;
constexpr std::int64_t kForwardTokens = 8;  // tokens of one thread forward: enough to pay for loading its bias and gate

template <typename T>
struct Rows {
  T* data;
  std::int64_t stride_b, stride_t;

  __device__ T* at(std::int64_t b, std::int64_t t, std::int64_t f) const { return data + b * stride_b + t * stride_t + f; }
};

template <typename T>
Rows<T> rows_of(const OptionalView& view) {
  if (!view) return {nullptr, 0, 0};
  return {view->as<T>(), view->strides[0], view->strides[1]};
}

// What both passes read. Vectors that were left out are null.
template <typename T, typename ACC>
struct Input {
  std::int64_t batch, tokens, filters;
  Rows<T> pre, up;
  const ACC *bias, *up_bias, *gate;
  std::int64_t gate_stride;
  Activation activation;

  explicit Input(const ActivationInput& in)
      : batch(in.pre.shape[0]), tokens(in.pre.shape[1]), filters(in.pre.shape[2]), pre(rows_of<T>(in.pre)),
        up(rows_of<T>(in.up)), bias(in.bias ? in.bias->as<ACC>() : nullptr),
        up_bias(in.up_bias ? in.up_bias->as<ACC>() : nullptr), gate(in.gate ? in.gate->as<ACC>() : nullptr),
        gate_stride(in.gate ? in.gate->strides[0] : 0), activation(in.activation) {}
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

// N neighbouring values, or a constant where there are none.
template <typename ACC, int N>
__device__ __forceinline__ void load_vector(const ACC* from, std::int64_t offset, ACC otherwise, ACC (&to)[N]) {
  constexpr int kPack = N == 1 ? 1 : 16 / sizeof(ACC);
  static_assert(N % kPack == 0);
#pragma unroll
  for (int first = 0; first < N; first += kPack) {
    Pack<ACC, kPack> values;
    if (from) values = load_pack<ACC, kPack>(from + offset + first);
#pragma unroll
    for (int i = 0; i < kPack; ++i) to[first + i] = from ? values.values[i] : otherwise;
  }
}

// Calls the body with the activation as a constant, so that no loop in it branches on it.
template <typename Body>
__device__ __forceinline__ void with_constant(Activation activation, Body body) {
  switch (activation) {
    case Activation::gelu: return body(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh: return body(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::relu: return body(std::integral_constant<Activation, Activation::relu>());
    default: return body(std::integral_constant<Activation, Activation::silu>());
  }
}

// One thread owns N neighbouring filters of a sample and walks over tokens blockIdx.y, blockIdx.y + gridDim.y, ...
template <typename T, typename ACC, int N, bool GATED>
__global__ void __launch_bounds__(kThreads) forward_kernel(Input<T, ACC> in, Rows<T> result) {
  const std::int64_t f = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (f >= in.filters) return;
  constexpr int kUnroll = GATED ? 1 : 2;  // tokens, so that a thread has two loads in flight
  ACC bias[N], up_bias[N], gate[N];
  load_vector<ACC, N>(in.bias, f, 0, bias);
  if constexpr (GATED) load_vector<ACC, N>(in.up_bias, f, 0, up_bias);
  with_constant(in.activation, [&](auto activation) {
    for (std::int64_t b = blockIdx.z; b < in.batch; b += gridDim.z) {
      load_vector<ACC, N>(in.gate, b * in.gate_stride + f, 1, gate);
      for (std::int64_t first = blockIdx.y; first < in.tokens; first += kUnroll * gridDim.y) {
        Pack<T, N> pre[kUnroll], up[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const std::int64_t t = first + u * gridDim.y;
          if (t >= in.tokens) break;
          pre[u] = load_pack<T, N>(in.pre.at(b, t, f));
          if constexpr (GATED) up[u] = load_pack<T, N>(in.up.at(b, t, f));
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const std::int64_t t = first + u * gridDim.y;
          if (t >= in.tokens) break;
          Pack<T, N> out;
#pragma unroll
          for (int i = 0; i < N; ++i) {
            ACC value = activate<activation.value>(to_acc<ACC>(pre[u].values[i]) + bias[i]);
            if constexpr (GATED) value *= to_acc<ACC>(up[u].values[i]) + up_bias[i];
            out.values[i] = from_acc<T, ACC>(value * gate[i]);
          }
          store_pack(result.at(b, t, f), out);
        }
      }
    }
  });
}

// Blocks on a multiprocessor; 0 leaves it to the compiler, which in fp64 would rather spill than take a few registers more.
template <typename ACC>
constexpr int kBlocks = sizeof(ACC) == 8 ? 3 : 0;

// As forward; a thread sums its tokens' scores into partial [B, splits, F]. Outputs nobody wants are null.
template <typename T, typename ACC, int N, bool GATED>
__global__ void __launch_bounds__(kThreads, kBlocks<ACC>)
backward_kernel(Rows<T> grad, Input<T, ACC> in, Rows<T> d_pre, Rows<T> d_up, ACC* __restrict__ partial) {
  const std::int64_t f = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (f >= in.filters) return;
  ACC bias[N], up_bias[N], gate[N];
  load_vector<ACC, N>(in.bias, f, 0, bias);
  if constexpr (GATED) load_vector<ACC, N>(in.up_bias, f, 0, up_bias);
  with_constant(in.activation, [&](auto activation) {
    for (std::int64_t b = blockIdx.z; b < in.batch; b += gridDim.z) {
      load_vector<ACC, N>(in.gate, b * in.gate_stride + f, 1, gate);
      ACC sum[N] = {};
      for (std::int64_t t = blockIdx.y; t < in.tokens; t += gridDim.y) {
        const Pack<T, N> upstream = load_pack<T, N>(grad.at(b, t, f)), pre = load_pack<T, N>(in.pre.at(b, t, f));
        Pack<T, N> up, out, out_up;
        if constexpr (GATED) up = load_pack<T, N>(in.up.at(b, t, f));
#pragma unroll
        for (int i = 0; i < N; ++i) {
          ACC value, slope;
          activate_with_slope<activation.value>(to_acc<ACC>(pre.values[i]) + bias[i], value, slope);
          const ACC g = to_acc<ACC>(upstream.values[i]), gated = g * gate[i];
          if constexpr (GATED) {
            const ACC u = to_acc<ACC>(up.values[i]) + up_bias[i];
            sum[i] += g * (value * u);
            out.values[i] = from_acc<T, ACC>(gated * u * slope);
            out_up.values[i] = from_acc<T, ACC>(gated * value);
          } else {
            sum[i] += g * value;
            out.values[i] = from_acc<T, ACC>(gated * slope);
          }
        }
        if (d_pre.data) store_pack(d_pre.at(b, t, f), out);
        if constexpr (GATED) {
          if (d_up.data) store_pack(d_up.at(b, t, f), out_up);
        }
      }
      if (partial) store_vector(partial + (b * gridDim.y + blockIdx.y) * in.filters + f, sum);
    }
  });
}

// scores[group, f] = sum of the group's rows of partial, in their order.
template <typename ACC>
__global__ void __launch_bounds__(kThreads)
fold_kernel(const ACC* __restrict__ partial, ACC* __restrict__ scores, std::int64_t groups, std::int64_t rows,
            std::int64_t filters) {
  const std::int64_t f = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (f >= filters) return;
  for (std::int64_t group = blockIdx.y; group < groups; group += gridDim.y) {
    ACC sum = 0;
#pragma unroll 8  // loads in flight
    for (std::int64_t row = 0; row < rows; ++row) sum += partial[(group * rows + row) * filters + f];
    scores[group * filters + f] = sum;
  }
}

// 16-byte accesses need every row of every tensor to start at a multiple of 16 bytes.
bool rows_aligned(const OptionalView& view, int vector) {
  return !view || (aligned(view->data, 16) && view->strides[0] % vector == 0 && view->strides[1] % vector == 0);
}

// The same of what has one value per filter, and of the gate's rows.
bool vectors_aligned(const ActivationInput& in, std::int64_t elements) {
  bool all = !in.gate || in.gate->strides[0] % elements == 0;
  for (const OptionalView* vector : {&in.bias, &in.up_bias, &in.gate})
    all = all && (!*vector || aligned((*vector)->data, 16));
  return all;
}

dim3 grid_of(std::int64_t filters, int vector, std::int64_t splits, std::int64_t batch) {
  const std::int64_t packs = (filters + vector - 1) / vector;
  return {static_cast<unsigned>((packs + kThreads - 1) / kThreads), static_cast<unsigned>(splits),
          static_cast<unsigned>(std::min(batch, kMaxGrid))};
}

template <typename T, typename ACC, int N>
void launch_forward(const Input<T, ACC>& in, const Rows<T>& result, cudaStream_t stream) {
  const std::int64_t splits = std::min(kMaxGrid, (in.tokens + kForwardTokens - 1) / kForwardTokens);
  const dim3 grid = grid_of(in.filters, N, splits, in.batch);
  if (in.up.data)
    forward_kernel<T, ACC, N, true><<<grid, kThreads, 0, stream>>>(in, result);
  else
    forward_kernel<T, ACC, N, false><<<grid, kThreads, 0, stream>>>(in, result);
}

template <typename T, typename ACC>
void forward(const ActivationInput& view, const TensorView& result, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (result.numel() == 0) return;
  const Input<T, ACC> in(view);
  const bool vector = in.filters % kVector == 0 && vectors_aligned(view, 16 / sizeof(ACC)) &&
                      rows_aligned(view.pre, kVector) && rows_aligned(view.up, kVector) && rows_aligned(result, kVector);
  if (vector)
    launch_forward<T, ACC, kVector>(in, rows_of<T>(result), stream);
  else
    launch_forward<T, ACC, 1>(in, rows_of<T>(result), stream);
  cuda_check(cudaGetLastError(), "masked_activation");
}

template <typename T, typename ACC, int N>
void launch_backward(const TensorView& grad, const Input<T, ACC>& in, const ActivationGradients& out, ACC* partial,
                     std::int64_t splits, cudaStream_t stream) {
  const dim3 grid = grid_of(in.filters, N, splits, in.batch);
  const Rows<T> upstream = rows_of<T>(grad), d_pre = rows_of<T>(out.d_pre), d_up = rows_of<T>(out.d_up);
  if (in.up.data)
    backward_kernel<T, ACC, N, true><<<grid, kThreads, 0, stream>>>(upstream, in, d_pre, d_up, partial);
  else
    backward_kernel<T, ACC, N, false><<<grid, kThreads, 0, stream>>>(upstream, in, d_pre, d_up, partial);
}

template <typename T, typename ACC>
void backward(const TensorView& grad, const ActivationInput& view, const ActivationGradients& out,
              const OptionalView& workspace, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const Input<T, ACC> in(view);
  ACC* partial = out.scores ? workspace->as<ACC>() : nullptr;
  const std::int64_t splits = out.scores ? workspace->shape[1]
                                         : std::clamp<std::int64_t>((in.tokens + kForwardTokens - 1) / kForwardTokens, 1, kMaxGrid);
  if (in.filters == 0) return;
  if (in.batch > 0) {
    bool vector = in.filters % kVector == 0 && vectors_aligned(view, 16 / sizeof(ACC)) && rows_aligned(grad, kVector);
    for (const OptionalView& rows : {OptionalView(view.pre), view.up, out.d_pre, out.d_up})
      vector = vector && rows_aligned(rows, kVector);
    if (vector)
      launch_backward<T, ACC, kVector>(grad, in, out, partial, splits, stream);
    else
      launch_backward<T, ACC, 1>(grad, in, out, partial, splits, stream);
  }
  if (out.scores && out.scores->shape[0] > 0) {
    const std::int64_t groups = out.scores->shape[0], rows = in.batch * splits / groups;
    const dim3 grid(static_cast<unsigned>((in.filters + kThreads - 1) / kThreads),
                    static_cast<unsigned>(std::min(groups, kMaxGrid)));
    fold_kernel<ACC><<<grid, kThreads, 0, stream>>>(partial, out.scores->as<ACC>(), groups, rows, in.filters);
  }
  cuda_check(cudaGetLastError(), "masked_activation_backward");
}

}  // namespace

void masked_activation_cuda(const ActivationInput& in, const TensorView& result, cudaStream_t stream) {
  const DeviceGuard guard(in.pre.device);
  switch (in.pre.dtype) {
    case DType::f64: return forward<double, double>(in, result, stream);
    case DType::f32: return forward<float, float>(in, result, stream);
    case DType::bf16: return forward<__nv_bfloat16, float>(in, result, stream);
    case DType::f16: return forward<__half, float>(in, result, stream);
    default: throw std::invalid_argument("masked_activation takes floating point tensors");
  }
}

void masked_activation_backward_cuda(const TensorView& grad, const ActivationInput& in, const ActivationGradients& out,
                                     const OptionalView& workspace, cudaStream_t stream) {
  const DeviceGuard guard(in.pre.device);
  switch (in.pre.dtype) {
    case DType::f64: return backward<double, double>(grad, in, out, workspace, stream);
    case DType::f32: return backward<float, float>(grad, in, out, workspace, stream);
    case DType::bf16: return backward<__nv_bfloat16, float>(grad, in, out, workspace, stream);
    case DType::f16: return backward<__half, float>(grad, in, out, workspace, stream);
    default: throw std::invalid_argument("masked_activation_backward takes floating point tensors");
  }
}

}  // namespace pymape
