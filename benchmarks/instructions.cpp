// Calls one CPU kernel of the core a number of times: `instructions KERNEL TYPE CALLS`. It prints the elements of a call.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "greedy_swap.h"
#include "half.h"
#include "masked_attention.h"
#include "masked_ffn.h"
#include "module_scores.h"

namespace {

using pymape::DType;
using pymape::TensorView;

constexpr std::int64_t kBatch = 4, kTokens = 128, kFilters = 3072, kHeads = 12, kSize = 64;

// Tensors of random values, which live as long as the process.
struct Tensors {
  DType dtype;
  std::mt19937 generator{0};
  std::vector<std::vector<std::uint64_t>> storage{};

  TensorView make(std::initializer_list<std::int64_t> shape, DType as) {
    TensorView view;
    view.dtype = as;
    for (const std::int64_t size : shape) view.shape[view.ndim++] = size;
    std::int64_t stride = 1;
    for (int i = view.ndim - 1; i >= 0; --i) view.strides[i] = stride, stride *= view.shape[i];
    storage.emplace_back(stride + 8);
    view.data = storage.back().data();
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < stride; ++i) {
      const float value = normal(generator);
      switch (as) {
        case DType::f64: view.as<double>()[i] = value; break;
        case DType::f32: view.as<float>()[i] = value; break;
        case DType::bf16: view.as<pymape::BFloat16>()[i] = pymape::BFloat16(value); break;
        case DType::f16: view.as<pymape::Half>()[i] = pymape::Half(value); break;
        case DType::i64: view.as<std::int64_t>()[i] = 0; break;
        case DType::boolean: view.as<bool>()[i] = value > 1.28f; break;  // one in ten
      }
    }
    return view;
  }
  TensorView make(std::initializer_list<std::int64_t> shape) { return make(shape, dtype); }
  TensorView wide(std::initializer_list<std::int64_t> shape) {
    return make(shape, dtype == DType::f64 ? DType::f64 : DType::f32);
  }
};

struct Job {
  std::int64_t elements;
  std::function<void()> call;
};

Job job_of(const std::string& kernel, Tensors& t) {
  if (kernel == "module_scores") {
    const auto output = t.make({kBatch, kTokens, kFilters, 1}), grad = t.make({kBatch, kTokens, kFilters, 1});
    const auto scores = t.wide({kBatch, kFilters});
    return {output.numel(), [=] { pymape::module_scores(output, grad, scores, 1); }};
  }
  if (kernel == "gate_heads" || kernel == "gate_heads_backward") {
    const auto output = t.make({kBatch, kTokens, kHeads, kSize}), grad = t.make({kBatch, kTokens, kHeads, kSize});
    const auto result = t.make({kBatch, kTokens, kHeads, kSize});
    const auto gate = t.wide({kBatch, kHeads}), scores = t.wide({kBatch, kHeads});
    if (kernel == "gate_heads") return {output.numel(), [=] { pymape::gate_heads(output, gate, result, 1); }};
    return {output.numel(), [=] { pymape::gate_heads_backward(grad, output, gate, result, scores, 1); }};
  }
  if (kernel.starts_with("masked_activation")) {
    const bool gated = kernel.find("silu") != std::string::npos;
    const auto pre = t.make({kBatch, kTokens, kFilters}), up = t.make({kBatch, kTokens, kFilters});
    const auto grad = t.make({kBatch, kTokens, kFilters}), result = t.make({kBatch, kTokens, kFilters});
    const auto d_up = t.make({kBatch, kTokens, kFilters});
    const auto bias = t.wide({kFilters}), gate = t.wide({kBatch, kFilters}), scores = t.wide({kBatch, kFilters});
    pymape::ActivationInput in{pre, bias, {}, {}, gate, gated ? pymape::Activation::silu : pymape::Activation::gelu};
    if (gated) in.up = up;
    if (kernel.find("backward") == std::string::npos)
      return {pre.numel(), [=] { pymape::masked_activation(in, result, 1); }};
    pymape::ActivationGradients out{result, {}, scores};
    if (gated) out.d_up = d_up;
    return {pre.numel(), [=] { pymape::masked_activation_backward(grad, in, out, 1); }};
  }
  if (kernel == "greedy_swap") {
    constexpr std::int64_t samples = 64, swaps = 100;
    const auto forget = t.make({samples, 1, kFilters}), retain = t.make({samples, 1, kFilters});
    const pymape::GreedySwapOutputs out{t.make({1, kFilters}, DType::boolean), t.make({1}, DType::f64),
                                        t.make({1}, DType::f64), t.make({1}, DType::i64)};
    const std::vector<char> start(out.mask.as<char>(), out.mask.as<char>() + kFilters);
    return {2 * samples * kFilters * swaps, [=] {
              std::memcpy(out.mask.data, start.data(), start.size());
              pymape::greedy_swap(forget, &retain, nullptr, 1.0, swaps, pymape::SwapMode::swap, out, 1);
            }};
  }
  std::fprintf(stderr, "no such kernel: %s\n", kernel.c_str());
  std::exit(2);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::map<std::string, DType> types{
      {"float64", DType::f64}, {"float32", DType::f32}, {"bfloat16", DType::bf16}, {"float16", DType::f16}};
  Tensors tensors{types.at(argv[2])};
  const Job job = job_of(argv[1], tensors);
  for (int call = 0; call < std::atoi(argv[3]); ++call) job.call();
  std::printf("%lld\n", static_cast<long long>(job.elements));
}
