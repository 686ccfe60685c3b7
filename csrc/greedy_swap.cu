#include "greedy_swap.h"

#include <cfloat>
#include <climits>

#include "cuda_utils.cuh"

namespace pymape {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kLeaves = 2 * kThreads;  // modules of one scan that may leave
constexpr int kRows = 4;  // modules whose rows a warp reads at once
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr double kTolerance = 1e-12;  // as in greedy_swap.cpp, like the two below
constexpr double kInflation = 1e-7;
constexpr double kSlack = 1e-14;

struct Problem {
  std::int64_t modules, samples, forget_samples, max_swaps, workspace;
  double scale, forget_weight, retain_weight;
  bool gains_in_shared;
};

// An exchange beats another by its gain, then by the lower module that enters, then by the lower one that leaves.
struct Exchange {
  double gain;
  int enters, leaves;

  __device__ void offer(double other, int i, int j) {
    if (other > gain || (other == gain && (i < enters || (i == enters && j < leaves)))) gain = other, enters = i, leaves = j;
  }
};

// What a scan needs of a module that may leave.
struct Leaf {
  double gain, forget_radius, retain_radius;
  int module;
};

struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Max {
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

template <typename Op>
__device__ double warp_reduce(double value, Op op) {
  for (int lane = 16; lane > 0; lane /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, lane));
  return value;
}

template <typename Op>
__device__ double block_reduce(double value, double* scratch, Op op) {
  value = warp_reduce(value, op);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) value = op(value, scratch[warp]);
  __syncthreads();
  return value;
}

__device__ Exchange block_best(Exchange best, Exchange* scratch) {
  for (int lane = 16; lane > 0; lane /= 2) {
    const double gain = __shfl_xor_sync(kAllLanes, best.gain, lane);
    const int enters = __shfl_xor_sync(kAllLanes, best.enters, lane);
    best.offer(gain, enters, __shfl_xor_sync(kAllLanes, best.leaves, lane));
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = best;
  __syncthreads();
  best = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) best.offer(scratch[warp].gain, scratch[warp].enters, scratch[warp].leaves);
  __syncthreads();
  return best;
}

// One block works on one layer. Everything is kept N_f N_r times too large, which keeps sums over integers exact.
template <typename T, SwapMode kMode>
struct Layer {
  static constexpr bool kSwap = kMode == SwapMode::swap;

  const Problem& p;
  const T* rows;                            // [M, N]
  const double* linear;                     // [M] or null
  bool* selected;                           // [M]
  double *half, *forget_radius, *retain_radius, *norm;  // [M], global memory
  double *gain, *sum, *weighted;            // [M], [N], [N], shared memory where they fit
  double* scratch;                          // [kWarps], shared
  Exchange* exchanges;                      // [kWarps], shared
  Leaf* leaves;                             // [kLeaves], shared
  int* counts;                              // [kWarps], shared
  unsigned long long* floor;                // the best gain any warp has found: gains are not negative, so bits order them

  __device__ double offset(std::int64_t m) const { return linear ? linear[m] * p.scale : 0.0; }
  __device__ double weight(std::int64_t n) const { return n < p.forget_samples ? p.forget_weight : p.retain_weight; }
  // The quadratic form that steers: that of the objective, or minus the forget set's (see greedy_swap.cpp).
  __device__ double steering_weight(std::int64_t n) const {
    if (kSwap) return weight(n);
    return n < p.forget_samples ? -p.forget_weight : 0.0;
  }

  using Values = Pack<T, 16 / sizeof(T)>;
  static constexpr int kPack = 16 / sizeof(T);

  __device__ Values load(std::int64_t m, std::int64_t n) const {
    return *reinterpret_cast<const Values*>(rows + m * p.samples + n);
  }

  // Row i times the steering form times row j; every lane gets the result.
  __device__ double coupling(std::int64_t i, std::int64_t j) const {
    double total = 0;
#pragma unroll 2  // more would run out of registers
    for (std::int64_t n = threadIdx.x % 32 * kPack; n < p.samples; n += 32 * kPack) {
      const Values one = load(i, n), other = load(j, n);
#pragma unroll
      for (int k = 0; k < kPack; ++k)
        total += static_cast<double>(one.values[k]) * (steering_weight(n + k) * static_cast<double>(other.values[k]));
    }
    return warp_reduce(total, Sum());
  }

  // Returns the threshold that a gain must exceed.
  __device__ double prepare(double& widest_forget, double& widest_retain) {
    double diagonal = 0, forget = 0, retain = 0;
    for (std::int64_t m = threadIdx.x / 32; m < p.modules; m += kWarps) {
      const T* row = rows + m * p.samples;
      double forget_norm = 0, retain_norm = 0;
      for (std::int64_t n = threadIdx.x % 32; n < p.samples; n += 32) {
        const double value = static_cast<double>(row[n]);
        (n < p.forget_samples ? forget_norm : retain_norm) += value * value;
      }
      forget_norm = warp_reduce(forget_norm, Sum());
      retain_norm = kSwap ? warp_reduce(retain_norm, Sum()) : 0.0;
      const double forget_part = p.forget_weight * forget_norm, retain_part = -p.retain_weight * retain_norm;
      if (threadIdx.x % 32 == 0) {
        norm[m] = forget_norm;
        half[m] = kSwap ? (forget_part - retain_part) / 2 : -forget_part / 2;
        forget_radius[m] = sqrt(forget_part) * (1 + kInflation);
        retain_radius[m] = sqrt(retain_part) * (1 + kInflation);
        diagonal += forget_part + retain_part + fabs(offset(m));
        forget = fmax(forget, forget_radius[m]);
        retain = fmax(retain, retain_radius[m]);
      }
    }
    widest_forget = block_reduce(forget, scratch, Max());
    widest_retain = block_reduce(retain, scratch, Max());
    return kTolerance * block_reduce(diagonal, scratch, Sum());
  }

  __device__ void sum_up(bool side) {
    for (std::int64_t n = threadIdx.x; n < p.samples; n += kThreads) {
      double total = 0;
      for (std::int64_t m = 0; m < p.modules; ++m)
        if (selected[m] == side) total += static_cast<double>(rows[m * p.samples + n]);
      sum[n] = side ? total : -total;
    }
    __syncthreads();
  }

  __device__ double objective() {
    sum_up(true);
    double total = 0;
    for (std::int64_t n = threadIdx.x; n < p.samples; n += kThreads) total += weight(n) * sum[n] * sum[n] / 2;
    for (std::int64_t m = threadIdx.x; m < p.modules; m += kThreads) total -= selected[m] ? offset(m) : 0.0;
    return block_reduce(total, scratch, Sum()) / p.scale;
  }

  __device__ void apply(const Exchange& exchange) {
    for (std::int64_t n = threadIdx.x; n < p.samples; n += kThreads)
      sum[n] += static_cast<double>(rows[exchange.enters * p.samples + n]) -
                static_cast<double>(rows[exchange.leaves * p.samples + n]);
    if (threadIdx.x == 0) selected[exchange.enters] = true, selected[exchange.leaves] = false;
    __syncthreads();
  }

  // What every module gains by itself: one pass over all rows, which is what a step takes most of its time for.
  __device__ void update_gains() {
    for (std::int64_t n = threadIdx.x; n < p.samples; n += kThreads) weighted[n] = steering_weight(n) * sum[n];
    __syncthreads();
    for (std::int64_t first = threadIdx.x / 32 * kRows; first < p.modules; first += kWarps * kRows) {
      double total[kRows] = {};
      for (std::int64_t n = threadIdx.x % 32 * kPack; n < p.samples; n += 32 * kPack) {
        Values values[kRows];
#pragma unroll
        for (int row = 0; row < kRows; ++row)
          values[row] = load(first + row < p.modules ? first + row : p.modules - 1, n);
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          const double factor = weighted[n + k];
#pragma unroll
          for (int row = 0; row < kRows; ++row) total[row] += static_cast<double>(values[row].values[k]) * factor;
        }
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const std::int64_t m = first + row;
        const double product = warp_reduce(total[row], Sum());
        if (threadIdx.x % 32 != 0 || m >= p.modules) continue;
        const double own = product - (kSwap ? offset(m) : 0.0);
        gain[m] = selected[m] ? half[m] - own : half[m] + own;
      }
    }
    __syncthreads();
  }

  __device__ Exchange extreme(bool side) const {
    Exchange best{-DBL_MAX, INT_MAX, INT_MAX};
    for (int m = threadIdx.x; m < p.modules; m += kThreads)
      if (selected[m] == side) best.offer(gain[m], m, m);
    return block_best(best, exchanges);
  }

  __device__ void start_floor(double value) {
    if (threadIdx.x == 0) *floor = static_cast<unsigned long long>(__double_as_longlong(value));
    __syncthreads();
  }

  // The best gain so far. One lane's reading counts for all, so that a warp never disagrees; beside atomicMax it need not be
  // an atomic: to the memory model a volatile read is a relaxed one.
  __device__ double reached(const Exchange& best) const {
    const double found = __longlong_as_double(static_cast<long long>(*static_cast<volatile unsigned long long*>(floor)));
    return fmax(best.gain, __shfl_sync(kAllLanes, found, 0));
  }

  // What the rest of a gain must reach when `alone` is one of its terms.
  static __device__ double limit(double found, double alone) {
    return found - kSlack * (fabs(found) + fabs(alone)) - alone;
  }

  __device__ Leaf leaf(int m) const { return {gain[m], forget_radius[m], retain_radius[m], m}; }

  // Appends to `leaves`, which hold `count`, the module m of every thread that has one; returns how many there are then.
  __device__ int append(bool chosen, std::int64_t m, int count) const {
    const unsigned votes = __ballot_sync(kAllLanes, chosen), lower = votes & ((1u << threadIdx.x % 32) - 1);
    if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = __popc(votes);
    __syncthreads();
    int place = count + __popc(lower);
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp < static_cast<int>(threadIdx.x / 32)) place += counts[warp];
      count += counts[warp];
    }
    if (chosen) leaves[place] = leaf(static_cast<int>(m));
    __syncthreads();
    return count;
  }

  // Offers the pairs of the first `count` leaves and of all other modules that Cauchy and Schwarz do not rule out: a warp
  // loads 32 modules that may enter and goes through the leaves.
  __device__ void scan(Exchange& best, int count) const {
    for (std::int64_t base = threadIdx.x / 32 * 32; base < p.modules; base += kThreads) {
      const std::int64_t m = base + threadIdx.x % 32;
      const bool outside = m < p.modules && !selected[m];
      const double own = outside ? gain[m] : 0.0, forget = outside ? forget_radius[m] : 0.0;
      const double retain = outside ? retain_radius[m] : 0.0;
      double found = reached(best);
      for (int n = 0; n < count; ++n) {
        const Leaf& leaving = leaves[n];
        const bool reachable = outside && own + (forget * leaving.forget_radius + retain * leaving.retain_radius) >=
                                              limit(found, leaving.gain);
        const unsigned votes = __ballot_sync(kAllLanes, reachable);
        if (votes == 0) continue;
        for (unsigned rest = votes; rest != 0; rest &= rest - 1) {
          const int enters = static_cast<int>(base) + __ffs(rest) - 1;
          best.offer((gain[enters] + leaving.gain) - coupling(enters, leaving.module), enters, leaving.module);
        }
        if (threadIdx.x % 32 == 0)
          atomicMax(floor, static_cast<unsigned long long>(__double_as_longlong(best.gain)));
        found = reached(best);
      }
    }
  }

  __device__ std::int64_t search(double threshold, double widest_forget, double widest_retain) {
    if constexpr (kSwap) return swap(threshold, widest_forget, widest_retain);
    return rearrange();
  }

  __device__ std::int64_t swap(double threshold, double widest_forget, double widest_retain) {
    const double least = nextafter(threshold, DBL_MAX);  // reached means exceeded
    sum_up(true);
    for (std::int64_t done = 0; done < p.max_swaps; ++done) {
      update_gains();
      const Exchange outside = extreme(false), inside = extreme(true);
      if (outside.enters == INT_MAX || inside.enters == INT_MAX) return done;
      Exchange best{least, INT_MAX, INT_MAX};
      const double shared = coupling(outside.enters, inside.enters);
      best.offer((outside.gain + inside.gain) - shared, outside.enters, inside.enters);
      start_floor(best.gain);
      int count = 0;
      for (std::int64_t first = 0; first < p.modules; first += kThreads) {
        const std::int64_t m = first + threadIdx.x;
        const double found = reached(best);
        bool chosen = m < p.modules && selected[m];
        if (chosen) {
          const double reach = forget_radius[m] * widest_forget + retain_radius[m] * widest_retain;
          chosen = outside.gain + reach >= limit(found, gain[m]);
        }
        count = append(chosen, m, count);
        if (count + kThreads <= kLeaves && first + kThreads < p.modules) continue;
        scan(best, count);
        count = 0;
        __syncthreads();
      }
      best = block_best(best, exchanges);
      if (best.enters == INT_MAX) return done;
      apply(best);
    }
    return p.max_swaps;
  }

  __device__ std::int64_t rearrange() {
    sum_up(false);
    for (std::int64_t m = threadIdx.x; m < p.modules; m += kThreads)
      if (!selected[m]) norm[m] = DBL_MAX;  // from here on: the norms of the modules still to be tried
    __syncthreads();
    std::int64_t exchanged = 0;
    bool stale = true;
    while (true) {
      Exchange next{-DBL_MAX, INT_MAX, INT_MAX};
      for (int m = threadIdx.x; m < p.modules; m += kThreads)
        if (norm[m] < DBL_MAX) next.offer(-norm[m], m, m);
      const int module = block_best(next, exchanges).enters;
      if (module == INT_MAX) return exchanged;
      if (threadIdx.x == 0) norm[module] = DBL_MAX;
      if (stale) update_gains();
      if (threadIdx.x == 0) leaves[0] = leaf(module);
      start_floor(0.0);
      Exchange best{0.0, module, module};  // it comes straight back
      scan(best, 1);
      best = block_best(best, exchanges);
      stale = best.enters != module;
      if (!stale) continue;
      apply(best);
      ++exchanged;
    }
  }
};

template <typename T, SwapMode kMode>
__global__ void __launch_bounds__(kThreads, 1)
greedy_swap_kernel(const T* __restrict__ rows, const double* __restrict__ linear, bool* mask, double* before, double* after,
                   std::int64_t* swaps, double* workspace, Problem p) {
  extern __shared__ double dynamic[];
  __shared__ double scratch[kWarps];
  __shared__ Exchange exchanges[kWarps];
  __shared__ Leaf leaves[kLeaves];
  __shared__ int counts[kWarps];
  __shared__ unsigned long long floor;
  const std::int64_t layer = blockIdx.x, modules = p.modules;
  double* base = workspace + layer * p.workspace;
  double* moving = p.gains_in_shared ? dynamic : base + 4 * modules;
  Layer<T, kMode> state{
      p,    rows + layer * modules * p.samples, linear ? linear + layer * modules : nullptr, mask + layer * modules,
      base, base + modules, base + 2 * modules, base + 3 * modules, moving, moving + modules,
      moving + modules + p.samples, scratch, exchanges, leaves, counts, &floor};
  double widest_forget, widest_retain;
  const double threshold = state.prepare(widest_forget, widest_retain);
  const double start = state.objective();
  const std::int64_t done = state.search(threshold, widest_forget, widest_retain);
  const double end = state.objective();
  if (threadIdx.x == 0) before[layer] = start, after[layer] = end, swaps[layer] = done;
}

template <typename T, SwapMode kMode>
void launch(const TensorView& rows, const TensorView* linear, const GreedySwapOutputs& outputs, const TensorView& workspace,
            Problem p, cudaStream_t stream) {
  const auto kernel = greedy_swap_kernel<T, kMode>;
  int available = 0;
  cuda_check(cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, rows.device), "greedy_swap");
  cudaFuncAttributes attributes;
  cuda_check(cudaFuncGetAttributes(&attributes, kernel), "greedy_swap");
  const std::size_t wanted = sizeof(double) * static_cast<std::size_t>(p.modules + 2 * p.samples);
  p.gains_in_shared = wanted + attributes.sharedSizeBytes <= static_cast<std::size_t>(available);
  const std::size_t bytes = p.gains_in_shared ? wanted : 0;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
             "greedy_swap");
  kernel<<<static_cast<unsigned>(rows.shape[0]), kThreads, bytes, stream>>>(
      rows.as<T>(), linear ? linear->as<double>() : nullptr, outputs.mask.as<bool>(), outputs.before.as<double>(),
      outputs.after.as<double>(), outputs.swaps.as<std::int64_t>(), workspace.as<double>(), p);
  cuda_check(cudaGetLastError(), "greedy_swap");
}

template <typename T>
void run(SwapMode mode, const TensorView& rows, const TensorView* linear, const GreedySwapOutputs& outputs,
         const TensorView& workspace, const Problem& p, cudaStream_t stream) {
  if (mode == SwapMode::swap) return launch<T, SwapMode::swap>(rows, linear, outputs, workspace, p, stream);
  return launch<T, SwapMode::rearrange>(rows, linear, outputs, workspace, p, stream);
}

}  // namespace

void greedy_swap_cuda(const TensorView& rows, std::int64_t forget_samples, std::int64_t retain_samples,
                      const TensorView* linear, double lam, std::int64_t max_swaps, SwapMode mode,
                      const GreedySwapOutputs& outputs, const TensorView& workspace, cudaStream_t stream) {
  if (rows.shape[0] == 0) return;
  const DeviceGuard guard(rows.device);
  Problem p{};
  p.modules = rows.shape[1], p.samples = rows.shape[2], p.forget_samples = forget_samples, p.max_swaps = max_swaps;
  p.forget_weight = retain_samples > 0 ? static_cast<double>(retain_samples) : 1.0;
  p.retain_weight = -lam * static_cast<double>(forget_samples);
  p.scale = static_cast<double>(forget_samples) * p.forget_weight;
  p.workspace = greedy_swap_workspace(p.modules, p.samples);
  if (rows.dtype == DType::f64) return run<double>(mode, rows, linear, outputs, workspace, p, stream);
  return run<float>(mode, rows, linear, outputs, workspace, p, stream);
}

}  // namespace pymape
