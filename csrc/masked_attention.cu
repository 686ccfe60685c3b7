#include "masked_attention.h"

#include <algorithm>

#include "cuda_utils.cuh"

namespace pymape {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // tokens in flight per thread
constexpr std::int64_t kMaxGrid = 65535;

struct Strides {
  std::int64_t batch, token, head;
};

struct Problem {
  std::int64_t batch, tokens, heads, width, splits, gate_batch, gate_head;
};

// One thread owns N neighbouring elements of a head (a pack) and walks the tokens of its split: the gate is loaded once a
// sample, and no index is divided inside the loop. Threads are laid out as [splits, packs of a token].
template <typename T, typename ACC, int N, bool kBackward>
__global__ void __launch_bounds__(kThreads)
gate_heads_kernel(const T* __restrict__ in, const T* __restrict__ output, const ACC* __restrict__ gate,
                  T* __restrict__ result, ACC* __restrict__ partial, Strides in_strides, Strides output_strides,
                  Strides result_strides, Problem p) {
  const std::int64_t packs = p.heads * (p.width / N);
  const std::int64_t pack = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t split = static_cast<std::int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  if (pack >= packs || split >= p.splits) return;
  const std::int64_t head = pack / (p.width / N), column = pack % (p.width / N) * N;

  for (std::int64_t b = blockIdx.z; b < p.batch; b += gridDim.z) {
    const T* x = in + b * in_strides.batch + head * in_strides.head + column;
    const T* o = output + b * output_strides.batch + head * output_strides.head + column;
    T* y = result + b * result_strides.batch + head * result_strides.head + column;
    const ACC m = gate[b * p.gate_batch + head * p.gate_head];
    ACC sum = 0;
    for (std::int64_t first = split; first < p.tokens; first += kUnroll * p.splits) {
      Pack<T, N> left[kUnroll], right[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const std::int64_t t = first + u * p.splits;
        if (t >= p.tokens) break;
        left[u] = *reinterpret_cast<const Pack<T, N>*>(x + t * in_strides.token);
        if constexpr (kBackward) right[u] = *reinterpret_cast<const Pack<T, N>*>(o + t * output_strides.token);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const std::int64_t t = first + u * p.splits;
        if (t >= p.tokens) break;
        Pack<T, N> scaled;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const ACC value = to_acc<ACC>(left[u].values[i]);
          scaled.values[i] = from_acc<T>(value * m);
          if constexpr (kBackward) sum += value * to_acc<ACC>(right[u].values[i]);
        }
        store_pack(y + t * result_strides.token, scaled);
      }
    }
    if constexpr (kBackward) partial[(b * p.splits + split) * packs + pack] = sum;
  }
}

// scores[b, h] = sum over splits and packs of partial[b, split, h * packs + pack], in a fixed order: one warp per head.
template <typename ACC>
__global__ void __launch_bounds__(kThreads)
fold_heads_kernel(const ACC* __restrict__ partial, ACC* __restrict__ scores, std::int64_t rows, std::int64_t heads,
                  std::int64_t splits, std::int64_t packs) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;  // b * H + h
  if (row >= rows) return;
  const ACC* base = partial + (row / heads * splits * heads + row % heads) * packs;
  ACC sum = 0;
  for (std::int64_t split = 0; split < splits; ++split)
    for (std::int64_t i = threadIdx.x % 32; i < packs; i += 32) sum += base[split * heads * packs + i];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) scores[row] = sum;
}

Strides strides_of(const TensorView& x) { return {x.strides[0], x.strides[1], x.strides[2]}; }

bool vectorises(const TensorView& x, std::int64_t elements, std::size_t bytes) {
  return x.strides[0] % elements == 0 && x.strides[1] % elements == 0 && x.strides[2] % elements == 0 &&
         aligned(x.data, bytes);
}

template <typename T, typename ACC, int N, bool kBackward>
void launch(const TensorView& in, const TensorView& output, const TensorView& gate, const TensorView& result,
            ACC* partial, const Problem& p, cudaStream_t stream) {
  const std::int64_t packs = p.heads * (p.width / N);
  int lanes = 32;  // threads along the packs of a token; the others take further splits
  while (lanes < kThreads && lanes < packs) lanes *= 2;
  const int rows = kThreads / lanes;
  const dim3 grid(static_cast<unsigned>((packs + lanes - 1) / lanes), static_cast<unsigned>((p.splits + rows - 1) / rows),
                  static_cast<unsigned>(std::min(p.batch, kMaxGrid)));
  gate_heads_kernel<T, ACC, N, kBackward><<<grid, dim3(lanes, rows), 0, stream>>>(
      in.as<T>(), output.as<T>(), gate.as<ACC>(), result.as<T>(), partial, strides_of(in), strides_of(output),
      strides_of(result), p);
}

template <typename T, typename ACC, bool kBackward>
void run(const TensorView& in, const TensorView& output, const TensorView& gate, const TensorView& result, ACC* partial,
         ACC* scores, std::int64_t splits, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const Problem p{in.shape[0], in.shape[1], in.shape[2], in.shape[3], splits, gate.strides[0], gate.strides[1]};
  if (p.batch == 0 || p.heads == 0) return;
  const bool vector = p.width % kVector == 0 && vectorises(in, kVector, 16) && vectorises(output, kVector, 16) &&
                      vectorises(result, kVector, 16);
  // Without tokens or columns there is nothing to launch over, but the scores are still to be set to zero.
  const bool work = p.tokens > 0 && p.width > 0;
  if (work && vector)
    launch<T, ACC, kVector, kBackward>(in, output, gate, result, partial, p, stream);
  else if (work)
    launch<T, ACC, 1, kBackward>(in, output, gate, result, partial, p, stream);
  if constexpr (kBackward) {
    const std::int64_t rows = p.batch * p.heads, packs = vector ? p.width / kVector : p.width;
    const unsigned blocks = static_cast<unsigned>((rows + kThreads / 32 - 1) / (kThreads / 32));
    fold_heads_kernel<ACC><<<blocks, kThreads, 0, stream>>>(partial, scores, rows, p.heads, work ? splits : 0, packs);
  }
  cuda_check(cudaGetLastError(), "gate_heads");
}

template <typename T, typename ACC>
void forward(const TensorView& output, const TensorView& gate, const TensorView& result, cudaStream_t stream) {
  const std::int64_t splits = std::clamp<std::int64_t>((output.shape[1] + kUnroll - 1) / kUnroll, 1, kMaxGrid);
  run<T, ACC, false>(output, output, gate, result, nullptr, nullptr, splits, stream);
}

template <typename T, typename ACC>
void backward(const TensorView& grad, const TensorView& output, const TensorView& gate, const TensorView& d_output,
              const TensorView& scores, const TensorView& workspace, cudaStream_t stream) {
  run<T, ACC, true>(grad, output, gate, d_output, workspace.as<ACC>(), scores.as<ACC>(), workspace.shape[1], stream);
}

}  // namespace

void gate_heads_cuda(const TensorView& output, const TensorView& gate, const TensorView& result, cudaStream_t stream) {
  const DeviceGuard guard(output.device);
  switch (output.dtype) {
    case DType::f64: return forward<double, double>(output, gate, result, stream);
    case DType::f32: return forward<float, float>(output, gate, result, stream);
    case DType::bf16: return forward<__nv_bfloat16, float>(output, gate, result, stream);
    case DType::f16: return forward<__half, float>(output, gate, result, stream);
    default: throw std::invalid_argument("gate_heads takes floating point tensors");
  }
}

void gate_heads_backward_cuda(const TensorView& grad, const TensorView& output, const TensorView& gate,
                              const TensorView& d_output, const TensorView& scores, const TensorView& workspace,
                              cudaStream_t stream) {
  const DeviceGuard guard(output.device);
  switch (output.dtype) {
    case DType::f64: return backward<double, double>(grad, output, gate, d_output, scores, workspace, stream);
    case DType::f32: return backward<float, float>(grad, output, gate, d_output, scores, workspace, stream);
    case DType::bf16: return backward<__nv_bfloat16, float>(grad, output, gate, d_output, scores, workspace, stream);
    case DType::f16: return backward<__half, float>(grad, output, gate, d_output, scores, workspace, stream);
    default: throw std::invalid_argument("gate_heads_backward takes floating point tensors");
  }
}

}  // namespace pymape
