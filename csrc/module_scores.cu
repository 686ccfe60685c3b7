#include "module_scores.h"

#include <algorithm>

#include "cuda_utils.cuh"

namespace pymape {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // tokens in flight per thread
constexpr std::int64_t kMaxGrid = 65535;

struct Layout {
  std::int64_t batch, tokens, modules, width, stride_ab, stride_at, stride_am, stride_bb, stride_bt, stride_bm;
};

// One thread owns N neighbouring lanes (lane = m * D + d) and sums them over the tokens of its split.
// partial: [B, splits, M * D]
template <typename T, typename ACC, int N>
__global__ void __launch_bounds__(kThreads, 4)
sum_tokens_kernel(const T* __restrict__ a, const T* __restrict__ b, ACC* __restrict__ partial, Layout s) {
  const std::int64_t lanes = s.modules * s.width;
  const std::int64_t lane = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (lane >= lanes) return;
  const std::int64_t module = lane / s.width, column = lane % s.width;
  const std::int64_t step = gridDim.y;

  for (std::int64_t sample = blockIdx.z; sample < s.batch; sample += gridDim.z) {
    const std::int64_t first = blockIdx.y;
    const T* row_a = a + sample * s.stride_ab + module * s.stride_am + column + first * s.stride_at;
    const T* row_b = b + sample * s.stride_bb + module * s.stride_bm + column + first * s.stride_bt;
    ACC sum[N] = {};
    std::int64_t t = first;
    for (; t + (kUnroll - 1) * step < s.tokens; t += kUnroll * step) {
      Pack<T, N> left[kUnroll], right[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        left[u] = *reinterpret_cast<const Pack<T, N>*>(row_a);
        right[u] = *reinterpret_cast<const Pack<T, N>*>(row_b);
        row_a += step * s.stride_at, row_b += step * s.stride_bt;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += to_acc<ACC>(left[u].values[i]) * to_acc<ACC>(right[u].values[i]);
    }
    for (; t < s.tokens; t += step, row_a += step * s.stride_at, row_b += step * s.stride_bt) {
      const Pack<T, N> left = *reinterpret_cast<const Pack<T, N>*>(row_a);
      const Pack<T, N> right = *reinterpret_cast<const Pack<T, N>*>(row_b);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += to_acc<ACC>(left.values[i]) * to_acc<ACC>(right.values[i]);
    }
    store_vector(partial + (sample * gridDim.y + blockIdx.y) * lanes + lane, sum);
  }
}

// scores[b, m] = sum over splits and d of partial[b, split, m * D + d], in a fixed order. A module has `group` threads, a
// power of two up to 32: where a module is one lane, neighbouring threads read neighbouring lanes.
template <typename ACC>
__global__ void __launch_bounds__(kThreads, 4)
fold_kernel(const ACC* __restrict__ partial, ACC* __restrict__ scores, std::int64_t batch, std::int64_t splits,
            std::int64_t modules, std::int64_t width, int group) {
  const std::int64_t module = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) / group;
  const int member = static_cast<int>(threadIdx.x) % group;
  for (std::int64_t sample = blockIdx.y; sample < batch; sample += gridDim.y) {
    ACC sum = 0;
    if (module < modules) {
      const std::int64_t lanes = modules * width;
      for (std::int64_t d = member; d < width; d += group) {
        const ACC* lane = partial + sample * splits * lanes + module * width + d;
#pragma unroll 8  // loads in flight
        for (std::int64_t split = 0; split < splits; ++split) sum += lane[split * lanes];
      }
    }
    for (int offset = group / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset, group);
    if (member == 0 && module < modules) scores[sample * modules + module] = sum;
  }
}

template <typename T, typename ACC, int N>
void launch_sum(const TensorView& output, const TensorView& grad, ACC* partial, std::int64_t splits, const Layout& s,
                cudaStream_t stream) {
  const std::int64_t vectors = (s.modules * s.width + N - 1) / N;
  if (vectors == 0) return;
  const dim3 grid(static_cast<unsigned>((vectors + kThreads - 1) / kThreads), static_cast<unsigned>(splits),
                  static_cast<unsigned>(std::min(s.batch, kMaxGrid)));
  sum_tokens_kernel<T, ACC, N><<<grid, kThreads, 0, stream>>>(output.as<T>(), grad.as<T>(), partial, s);
}

template <typename T, typename ACC>
void run(const TensorView& output, const TensorView& grad, const TensorView& scores, const TensorView& workspace,
         cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const Layout s{output.shape[0],   output.shape[1],   output.shape[2], output.shape[3], output.strides[0],
                 output.strides[1], output.strides[2], grad.strides[0], grad.strides[1], grad.strides[2]};
  const std::int64_t splits = workspace.shape[1];
  if (s.batch == 0 || s.modules == 0) return;

  // Lanes of one pack must lie side by side: within a module, or across modules where these are adjacent.
  const bool adjacent = s.stride_am == s.width && s.stride_bm == s.width;
  bool vector = (adjacent ? s.modules * s.width : s.width) % kVector == 0 && aligned(output.data, 16) && aligned(grad.data, 16);
  for (const std::int64_t stride : {s.stride_ab, s.stride_at, s.stride_bb, s.stride_bt})
    vector = vector && stride % kVector == 0;
  if (!adjacent) vector = vector && s.stride_am % kVector == 0 && s.stride_bm % kVector == 0;
  if (adjacent && s.width % kVector != 0) {
    // A pack may straddle modules: treat every lane as a module of width 1 for addressing.
    Layout flat = s;
    flat.modules = s.modules * s.width;
    flat.width = flat.stride_am = flat.stride_bm = 1;
    if (vector)
      launch_sum<T, ACC, kVector>(output, grad, workspace.as<ACC>(), splits, flat, stream);
    else
      launch_sum<T, ACC, 1>(output, grad, workspace.as<ACC>(), splits, flat, stream);
  } else if (vector) {
    launch_sum<T, ACC, kVector>(output, grad, workspace.as<ACC>(), splits, s, stream);
  } else {
    launch_sum<T, ACC, 1>(output, grad, workspace.as<ACC>(), splits, s, stream);
  }
  int group = 1;
  while (group < 32 && group < s.width) group *= 2;
  const std::int64_t threads = s.modules * group;
  const dim3 grid(static_cast<unsigned>((threads + kThreads - 1) / kThreads),
                  static_cast<unsigned>(std::min(s.batch, kMaxGrid)));
  fold_kernel<ACC><<<grid, kThreads, 0, stream>>>(workspace.as<ACC>(), scores.as<ACC>(), s.batch, splits, s.modules, s.width,
                                                  group);
  cuda_check(cudaGetLastError(), "module_scores");
}

}  // namespace

void module_scores_cuda(const TensorView& output, const TensorView& grad, const TensorView& scores,
                        const TensorView& workspace, cudaStream_t stream) {
  const DeviceGuard guard(output.device);
  switch (output.dtype) {
    case DType::f64: return run<double, double>(output, grad, scores, workspace, stream);
    case DType::f32: return run<float, float>(output, grad, scores, workspace, stream);
    case DType::bf16: return run<__nv_bfloat16, float>(output, grad, scores, workspace, stream);
    case DType::f16: return run<__half, float>(output, grad, scores, workspace, stream);
    default: throw std::invalid_argument("module_scores takes floating point tensors");
  }
}

}  // namespace pymape
