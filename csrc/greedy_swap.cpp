#include "greedy_swap.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "half.h"

namespace pymape {
namespace {

using Index = std::int32_t;

constexpr double kTolerance = 1e-12;  // of the objective's diagonal terms: a smaller gain is lost in rounding
constexpr double kInflation = 1e-7;   // radii grow by it, gains shrink by kSlack: rounding never prunes a best pair
constexpr double kSlack = 1e-14;
constexpr std::int64_t kPad = 16;     // rows are zero-padded to whole cache lines
constexpr std::int64_t kBlock = 64;   // candidates bounded together

// out[k] = sum over n of rows[index[k], n] * vector[n]. Products and sums are fp64: exact for integers, and four rows at a
// time are still bound by the memory they are read from.
#define PYMAPE_DOTS(T)                                                                                              \
  PYMAPE_MULTIVERSION void dots(const T* rows, std::int64_t stride, const Index* index, std::int64_t count,         \
                                const double* vector, std::int64_t length, double* out) {                           \
    std::int64_t k = 0;                                                                                             \
    for (; k + 4 <= count; k += 4) {                                                                                \
      const T *a = rows + index[k] * stride, *b = rows + index[k + 1] * stride;                                     \
      const T *c = rows + index[k + 2] * stride, *d = rows + index[k + 3] * stride;                                 \
      double sum_a = 0, sum_b = 0, sum_c = 0, sum_d = 0;                                                            \
      _Pragma("omp simd reduction(+ : sum_a, sum_b, sum_c, sum_d)") for (std::int64_t n = 0; n < length; ++n) {     \
        sum_a += static_cast<double>(a[n]) * vector[n];                                                             \
        sum_b += static_cast<double>(b[n]) * vector[n];                                                             \
        sum_c += static_cast<double>(c[n]) * vector[n];                                                             \
        sum_d += static_cast<double>(d[n]) * vector[n];                                                             \
      }                                                                                                             \
      out[k] = sum_a, out[k + 1] = sum_b, out[k + 2] = sum_c, out[k + 3] = sum_d;                                   \
    }                                                                                                               \
    for (; k < count; ++k) {                                                                                        \
      const T* a = rows + index[k] * stride;                                                                        \
      double sum = 0;                                                                                               \
      _Pragma("omp simd reduction(+ : sum)") for (std::int64_t n = 0; n < length; ++n) {                            \
        sum += static_cast<double>(a[n]) * vector[n];                                                               \
      }                                                                                                             \
      out[k] = sum;                                                                                                 \
    }                                                                                                               \
  }

PYMAPE_DOTS(double)
PYMAPE_DOTS(float)
#undef PYMAPE_DOTS

// Modules on one side of an exchange, best first: what each gains by itself, and the radii that bound how far a partner can
// change that: |Q_ij| <= forget_i forget_j + retain_i retain_j by Cauchy and Schwarz.
struct Candidates {
  std::vector<Index> module;
  std::vector<double> gain, forget, retain;
};

// The best module of one side and the widest radii among its modules.
struct Extremes {
  Index module = -1;
  double gain = -std::numeric_limits<double>::infinity(), forget = 0, retain = 0;
};

// Writes the blocks that may hold a pair of at least `threshold` with a partner of these radii; returns their number.
PYMAPE_MULTIVERSION std::int64_t reachable_blocks(const double* gain, const double* forget, const double* retain,
                                                  std::int64_t count, double forget_radius, double retain_radius,
                                                  double threshold, Index* blocks) {
  std::int64_t found = 0;
  for (std::int64_t first = 0; first < count; first += kBlock) {
    const std::int64_t last = std::min(count, first + kBlock);
    double highest = -std::numeric_limits<double>::infinity();
#pragma omp simd reduction(max : highest)
    for (std::int64_t k = first; k < last; ++k)
      highest = std::max(highest, gain[k] + (forget[k] * forget_radius + retain[k] * retain_radius));
    if (highest >= threshold) blocks[found++] = static_cast<Index>(first);
  }
  return found;
}

std::int64_t padded(std::int64_t samples) { return (samples + kPad - 1) / kPad * kPad; }

struct Exchange {
  double gain;
  Index enters = -1, leaves = -1;

  void offer(double other, Index i, Index j) {
    if (other < gain || (other == gain && (enters < 0 || i > enters || (i == enters && j > leaves)))) return;
    gain = other, enters = i, leaves = j;
  }
};

// One layer at a time, in memory that is allocated once. Everything is kept N_f N_r times too large, which keeps sums over
// integers exact and so ties are ties in every backend.
template <typename Store>
class Layer {
 public:
  Layer(const TensorView& forget, const TensorView* retain, double lam, SwapMode mode)
      : modules_(forget.shape[2]),
        forget_length_(padded(forget.shape[0])),
        stride_(forget_length_ + (retain ? padded(retain->shape[0]) : 0)),
        length_(mode == SwapMode::swap ? stride_ : forget_length_),
        scale_(static_cast<double>(forget.shape[0]) * static_cast<double>(retain ? retain->shape[0] : 1)),
        forget_weight_(retain ? static_cast<double>(retain->shape[0]) : 1.0),
        retain_weight_(-lam * static_cast<double>(forget.shape[0])),
        sign_(mode == SwapMode::swap ? 1.0 : -1.0),
        linear_weight_(mode == SwapMode::swap ? 1.0 : 0.0),
        storage_(modules_ * stride_ + kPad),
        sum_(stride_),
        weighted_(stride_),
        all_(modules_),
        norm_(modules_),
        forget_radius_(modules_),
        retain_radius_(modules_),
        half_(modules_),
        offset_(modules_),
        gain_(modules_),
        blocks_(modules_ / kBlock + 1) {
    const auto misaligned = reinterpret_cast<std::uintptr_t>(storage_.data()) % 64 / sizeof(Store);
    rows_ = storage_.data() + (misaligned ? 64 / sizeof(Store) - misaligned : 0);
    std::iota(all_.begin(), all_.end(), 0);
  }

  void load(const TensorView& forget, const TensorView* retain, const double* linear, std::int64_t layer) {
    copy(forget, layer, 0);
    if (retain) copy(*retain, layer, forget_length_);
    diagonal_ = 0;
    for (std::int64_t m = 0; m < modules_; ++m) {
      norm_[m] = squares(m, 0, forget_length_);
      const double forget_part = forget_weight_ * norm_[m];
      const double retain_part = retain_weight_ * squares(m, forget_length_, length_);
      half_[m] = (sign_ * forget_part + retain_part) / 2;
      forget_radius_[m] = std::sqrt(forget_part) * (1 + kInflation);
      retain_radius_[m] = std::sqrt(-retain_part) * (1 + kInflation);
      offset_[m] = linear ? linear[m] * scale_ : 0.0;
      diagonal_ += forget_part - retain_part + std::abs(offset_[m]);
    }
  }

  // J(S) of the objective, whatever the mode steers by.
  double objective(const bool* selected) {
    sum_up(selected, true);
    double total = 0;
    for (std::int64_t m = 0; m < modules_; ++m) total -= selected[m] ? offset_[m] : 0.0;
    for (std::int64_t n = 0; n < forget_length_; ++n) total += forget_weight_ * sum_[n] * sum_[n] / 2;
    for (std::int64_t n = forget_length_; n < stride_; ++n) total += retain_weight_ * sum_[n] * sum_[n] / 2;
    return total / scale_;
  }

  std::int64_t swap(bool* selected, std::int64_t max_swaps) {
    sum_up(selected, true);
    for (std::int64_t done = 0; done < max_swaps; ++done) {
      const Exchange best = best_exchange(selected);
      if (best.enters < 0) return done;
      apply(best, selected);
    }
    return max_swaps;
  }

  // The squared norm of the unselected modules' summed gradients falls by twice the gain of an exchange under Q = -F_f, with
  // minus that sum in place of the selected modules' own: the search of `swap`, with the leaving module given.
  std::int64_t rearrange(bool* selected) {
    sum_up(selected, false);
    std::vector<Index> order;
    gather(selected, true, order);
    std::stable_sort(order.begin(), order.end(), [this](Index a, Index b) { return norm_[a] < norm_[b]; });

    std::int64_t exchanged = 0;
    bool stale = true;
    for (const Index leaves : order) {
      if (stale) {
        update_gains(selected);
        gather(selected, false, outside_.module);
        fill(outside_);
      }
      Exchange best{0.0, leaves, leaves};  // it comes straight back
      offer_outside(best, leaves);
      stale = best.enters != leaves;
      if (!stale) continue;
      apply(best, selected);
      ++exchanged;
    }
    return exchanged;
  }

 private:
  template <typename T>
  void copy_as(const TensorView& gradients, std::int64_t layer, std::int64_t column) {
    constexpr std::int64_t kModules = 64 / sizeof(T);  // one cache line of the source
    const T* source = gradients.as<T>() + layer * gradients.strides[1];
    for (std::int64_t first = 0; first < modules_; first += kModules) {
      const std::int64_t last = std::min(modules_, first + kModules);
      for (std::int64_t n = 0; n < gradients.shape[0]; ++n)
        for (std::int64_t m = first; m < last; ++m)
          rows_[m * stride_ + column + n] =
              static_cast<Store>(source[n * gradients.strides[0] + m * gradients.strides[2]]);
    }
  }

  void copy(const TensorView& gradients, std::int64_t layer, std::int64_t column) {
    switch (gradients.dtype) {
      case DType::f64: return copy_as<double>(gradients, layer, column);
      case DType::f32: return copy_as<float>(gradients, layer, column);
      case DType::bf16: return copy_as<BFloat16>(gradients, layer, column);
      default: return copy_as<Half>(gradients, layer, column);
    }
  }

  double squares(std::int64_t module, std::int64_t first, std::int64_t last) const {
    const Store* row = rows_ + module * stride_;
    double total = 0;
    for (std::int64_t n = first; n < last; ++n) total += static_cast<double>(row[n]) * static_cast<double>(row[n]);
    return total;
  }

  void add(std::int64_t module, double sign) {
    const Store* row = rows_ + module * stride_;
    for (std::int64_t n = 0; n < stride_; ++n) sum_[n] += sign * static_cast<double>(row[n]);
  }

  // The sum of the selected modules' gradients, or minus that of the unselected ones.
  void sum_up(const bool* selected, bool side) {
    std::fill(sum_.begin(), sum_.end(), 0.0);
    for (std::int64_t m = 0; m < modules_; ++m)
      if (selected[m] == side) add(m, side ? 1.0 : -1.0);
  }

  void gather(const bool* selected, bool side, std::vector<Index>& members) const {
    members.clear();
    for (Index m = 0; m < modules_; ++m)
      if (selected[m] == side) members.push_back(m);
  }

  void apply(const Exchange& exchange, bool* selected) {
    selected[exchange.enters] = true;
    selected[exchange.leaves] = false;
    add(exchange.enters, 1.0);
    add(exchange.leaves, -1.0);
  }

  // weighted_ = weight * values, whose dot product with row i is (Q v)_i for a vector v of modules with `values` = rows^T v.
  template <typename T>
  void weigh(const T* values) {
    for (std::int64_t n = 0; n < forget_length_; ++n) weighted_[n] = sign_ * forget_weight_ * static_cast<double>(values[n]);
    for (std::int64_t n = forget_length_; n < length_; ++n) weighted_[n] = retain_weight_ * static_cast<double>(values[n]);
  }

  // What every module gains by itself: c = Q 1_S - linear comes from the running sum of gradients, by one pass over the rows
  // and without rounding that accumulates.
  void update_gains(const bool* selected) {
    weigh(sum_.data());
    dots(rows_, stride_, all_.data(), modules_, weighted_.data(), length_, gain_.data());
    for (std::int64_t m = 0; m < modules_; ++m) {
      const double coupling = gain_[m] - linear_weight_ * offset_[m];
      gain_[m] = selected[m] ? half_[m] - coupling : half_[m] + coupling;
    }
  }

  Exchange best_exchange(const bool* selected) {
    update_gains(selected);
    Extremes outside, inside;
    for (Index m = 0; m < modules_; ++m) {
      Extremes& side = selected[m] ? inside : outside;
      if (gain_[m] > side.gain) side.gain = gain_[m], side.module = m;
      side.forget = std::max(side.forget, forget_radius_[m]);
      side.retain = std::max(side.retain, retain_radius_[m]);
    }
    Exchange best{kTolerance * diagonal_};
    if (outside.module < 0 || inside.module < 0) return best;

    weigh(rows_ + inside.module * stride_);
    offer(best, inside.module, &outside.module, 1);
    collect(outside_, selected, false, inside, best);
    collect(inside_, selected, true, outside, best);
    for (const Index leaves : inside_.module) offer_outside(best, leaves);
    return best;
  }

  // Gathers, best first, the modules of one side that can be part of an exchange at least as good as `best`.
  void collect(Candidates& candidates, const bool* selected, bool side, const Extremes& partner, const Exchange& best) {
    const double threshold = best.gain - slack(best, partner.gain) - partner.gain;
    candidates.module.clear();
    for (Index m = 0; m < modules_; ++m) {
      const double reach = forget_radius_[m] * partner.forget + retain_radius_[m] * partner.retain;
      if (selected[m] == side && gain_[m] + reach >= threshold) candidates.module.push_back(m);
    }
    std::sort(candidates.module.begin(), candidates.module.end(), [this](Index a, Index b) { return gain_[a] > gain_[b]; });
    fill(candidates);
  }

  void fill(Candidates& candidates) const {
    candidates.gain.clear(), candidates.forget.clear(), candidates.retain.clear();
    for (const Index m : candidates.module) {
      candidates.gain.push_back(gain_[m]);
      candidates.forget.push_back(forget_radius_[m]);
      candidates.retain.push_back(retain_radius_[m]);
    }
  }

  // Offers every pair of `leaves` and an outside candidate that its bound does not rule out.
  void offer_outside(Exchange& best, Index leaves) {
    const double gain = gain_[leaves], forget = forget_radius_[leaves], retain = retain_radius_[leaves];
    const auto& [module, gains, forgets, retains] = outside_;
    const auto size = static_cast<std::int64_t>(module.size());
    const std::int64_t found = reachable_blocks(gains.data(), forgets.data(), retains.data(), size, forget, retain,
                                                best.gain - slack(best, gain) - gain, blocks_.data());
    if (found > 0) weigh(rows_ + leaves * stride_);
    for (std::int64_t b = 0; b < found; ++b) {
      const double threshold = best.gain - slack(best, gain) - gain;
      const std::int64_t last = std::min<std::int64_t>(size, blocks_[b] + kBlock);
      Index reachable[kBlock];
      std::int64_t count = 0;
      for (std::int64_t i = blocks_[b]; i < last; ++i)
        if (gains[i] + (forgets[i] * forget + retains[i] * retain) >= threshold) reachable[count++] = module[i];
      if (count > 0) offer(best, leaves, reachable, count);
    }
  }

  // weighted_ must hold the row of `leaves`.
  void offer(Exchange& best, Index leaves, const Index* enters, std::int64_t count) {
    double coupling[kBlock];
    dots(rows_, stride_, enters, count, weighted_.data(), length_, coupling);
    for (std::int64_t k = 0; k < count; ++k)
      best.offer((gain_[enters[k]] + gain_[leaves]) - coupling[k], enters[k], leaves);
  }

  static double slack(const Exchange& best, double gain) { return kSlack * (std::abs(best.gain) + std::abs(gain)); }

  std::int64_t modules_, forget_length_, stride_, length_;
  double scale_, forget_weight_, retain_weight_, sign_, linear_weight_, diagonal_ = 0;
  std::vector<Store> storage_;
  Store* rows_;  // [M, stride]: forget gradients, then retain gradients, of every module
  std::vector<double> sum_, weighted_;
  std::vector<Index> all_;
  std::vector<double> norm_, forget_radius_, retain_radius_, half_, offset_;
  std::vector<double> gain_;  // of every module: entering if it is outside, leaving if it is inside
  Candidates outside_, inside_;
  std::vector<Index> blocks_;
};

template <typename Store>
void run(const TensorView& forget, const TensorView* retain, const TensorView* linear, double lam, std::int64_t max_swaps,
         SwapMode mode, const GreedySwapOutputs& outputs, int num_threads) {
  const std::int64_t layers = forget.shape[1], modules = forget.shape[2];
  const int threads = static_cast<int>(std::clamp<std::int64_t>(layers, 1, num_threads));
  std::vector<Layer<Store>> workspaces;  // as many as threads: what bounds the memory
  workspaces.reserve(threads);
  for (int thread = 0; thread < threads; ++thread) workspaces.emplace_back(forget, retain, lam, mode);

#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (std::int64_t l = 0; l < layers; ++l) {
    Layer<Store>& layer = workspaces[omp_get_thread_num()];
    bool* selected = outputs.mask.as<bool>() + l * modules;
    layer.load(forget, retain, linear ? linear->as<double>() + l * modules : nullptr, l);
    outputs.before.as<double>()[l] = layer.objective(selected);
    outputs.swaps.as<std::int64_t>()[l] =
        mode == SwapMode::swap ? layer.swap(selected, max_swaps) : layer.rearrange(selected);
    outputs.after.as<double>()[l] = layer.objective(selected);
  }
}

}  // namespace

void greedy_swap(const TensorView& forget, const TensorView* retain, const TensorView* linear, double lam,
                 std::int64_t max_swaps, SwapMode mode, const GreedySwapOutputs& outputs, int num_threads) {
  if (forget.dtype == DType::f64 || (retain && retain->dtype == DType::f64))
    return run<double>(forget, retain, linear, lam, max_swaps, mode, outputs, num_threads);
  return run<float>(forget, retain, linear, lam, max_swaps, mode, outputs, num_threads);
}

}  // namespace pymape
