// The only PYBIND11_MODULE: checks what memory safety needs, releases the GIL, calls the kernel.
#include <pybind11/stl.h>

#include <algorithm>

#include "tensor_caster.h"

#include "greedy_swap.h"
#include "masked_attention.h"
#include "masked_ffn.h"
#include "module_scores.h"
#include "simulate_deletions.h"

namespace py = pybind11;
using pymape::DType;
using pymape::kCpu;
using pymape::OptionalView;
using pymape::require;
using pymape::TensorView;

namespace {

DType accumulator(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

bool same_shape(const TensorView& a, const TensorView& b) { return a.ndim == b.ndim && a.shape == b.shape; }

void check_module_scores(const TensorView& output, const TensorView& grad, const TensorView& scores) {
  require(output.ndim == 4 && same_shape(output, grad), "output and grad must share one shape [B, T, M, D]");
  require(output.dtype == grad.dtype && output.device == grad.device, "output and grad must share dtype and device");
  require(output.shape[3] <= 1 || (output.strides[3] == 1 && grad.strides[3] == 1), "the last dimension must be contiguous");
  require(scores.ndim == 2 && scores.shape[0] == output.shape[0] && scores.shape[1] == output.shape[2] &&
              scores.is_contiguous() && scores.dtype == accumulator(output.dtype) && scores.device == output.device,
          "scores must be a contiguous [B, M] tensor of the accumulator dtype");
}

void bind_module_scores(py::module_& m) {
  m.def(
      "module_scores",
      [](const TensorView& output, const TensorView& grad, const TensorView& scores, int num_threads) {
        check_module_scores(output, grad, scores);
        require(output.device == kCpu, "module_scores takes CPU tensors");
        py::gil_scoped_release release;
        pymape::module_scores(output, grad, scores, num_threads);
      },
      py::arg("output"), py::arg("grad"), py::arg("scores"), py::arg("num_threads"));
#ifdef PYMAPE_CUDA
  m.def(
      "module_scores_cuda",
      [](const TensorView& output, const TensorView& grad, const TensorView& scores, const TensorView& workspace,
         std::uintptr_t stream) {
        check_module_scores(output, grad, scores);
        require(output.device != kCpu && workspace.device == output.device, "module_scores_cuda takes CUDA tensors");
        require(workspace.ndim == 3 && workspace.is_contiguous() && workspace.dtype == scores.dtype &&
                    workspace.shape[0] == output.shape[0] && workspace.shape[1] >= 1 &&
                    workspace.shape[2] == output.shape[2] * output.shape[3],
                "workspace must be a contiguous [B, splits, M * D] tensor of the accumulator dtype");
        py::gil_scoped_release release;
        pymape::module_scores_cuda(output, grad, scores, workspace, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("output"), py::arg("grad"), py::arg("scores"), py::arg("workspace"), py::arg("stream"));
#endif
}

// The four-dimensional tensors of the head gate: one shape [B, T, H, D], dtype and device, heads contiguous.
void check_heads(const TensorView& x, const TensorView& like) {
  require(x.ndim == 4 && same_shape(x, like), "tensors of heads must share one shape [B, T, H, D]");
  require(x.dtype == like.dtype && x.device == like.device, "tensors of heads must share dtype and device");
  require(x.shape[3] <= 1 || x.strides[3] == 1 || x.numel() == 0, "the head dimension must be contiguous");
}

void check_head_gate(const TensorView& gate, const TensorView& heads) {
  require(gate.ndim == 2 && gate.shape[0] == heads.shape[0] && gate.shape[1] == heads.shape[2] &&
              gate.dtype == accumulator(heads.dtype) && gate.device == heads.device,
          "gate must be a [B, H] tensor of the accumulator dtype");
}

void check_gate_heads_backward(const TensorView& grad, const TensorView& output, const TensorView& gate,
                               const TensorView& d_output, const TensorView& scores) {
  check_heads(output, output);
  check_heads(grad, output);
  check_heads(d_output, output);
  check_head_gate(gate, output);
  check_head_gate(scores, output);
  require(scores.is_contiguous() || scores.numel() == 0, "scores must be contiguous");
}

void bind_masked_attention(py::module_& m) {
  m.def(
      "gate_heads",
      [](const TensorView& output, const TensorView& gate, const TensorView& result, int num_threads) {
        check_heads(output, output);
        check_heads(result, output);
        check_head_gate(gate, output);
        require(output.device == kCpu, "gate_heads takes CPU tensors");
        py::gil_scoped_release release;
        pymape::gate_heads(output, gate, result, num_threads);
      },
      py::arg("output"), py::arg("gate"), py::arg("result"), py::arg("num_threads"));
  m.def(
      "gate_heads_backward",
      [](const TensorView& grad, const TensorView& output, const TensorView& gate, const TensorView& d_output,
         const TensorView& scores, int num_threads) {
        check_gate_heads_backward(grad, output, gate, d_output, scores);
        require(output.device == kCpu, "gate_heads_backward takes CPU tensors");
        py::gil_scoped_release release;
        pymape::gate_heads_backward(grad, output, gate, d_output, scores, num_threads);
      },
      py::arg("grad"), py::arg("output"), py::arg("gate"), py::arg("d_output"), py::arg("scores"), py::arg("num_threads"));
#ifdef PYMAPE_CUDA
  m.def(
      "gate_heads_cuda",
      [](const TensorView& output, const TensorView& gate, const TensorView& result, std::uintptr_t stream) {
        check_heads(output, output);
        check_heads(result, output);
        check_head_gate(gate, output);
        require(output.device != kCpu, "gate_heads_cuda takes CUDA tensors");
        py::gil_scoped_release release;
        pymape::gate_heads_cuda(output, gate, result, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("output"), py::arg("gate"), py::arg("result"), py::arg("stream"));
  m.def(
      "gate_heads_backward_cuda",
      [](const TensorView& grad, const TensorView& output, const TensorView& gate, const TensorView& d_output,
         const TensorView& scores, const TensorView& workspace, std::uintptr_t stream) {
        check_gate_heads_backward(grad, output, gate, d_output, scores);
        require(output.device != kCpu && workspace.device == output.device, "gate_heads_backward_cuda takes CUDA tensors");
        require(workspace.ndim == 3 && workspace.is_contiguous() && workspace.dtype == scores.dtype &&
                    workspace.shape[0] == output.shape[0] && workspace.shape[1] >= 1 &&
                    workspace.shape[2] == output.shape[2] * output.shape[3],
                "workspace must be a contiguous [B, splits, H * D] tensor of the accumulator dtype");
        py::gil_scoped_release release;
        pymape::gate_heads_backward_cuda(grad, output, gate, d_output, scores, workspace,
                                         reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("grad"), py::arg("output"), py::arg("gate"), py::arg("d_output"), py::arg("scores"), py::arg("workspace"),
      py::arg("stream"));
#endif
}

void check_greedy_swap_outputs(const TensorView& gradients, std::int64_t layers, std::int64_t modules,
                               const TensorView* linear, const pymape::GreedySwapOutputs& outputs) {
  require(modules <= std::numeric_limits<std::int32_t>::max(), "a layer must have fewer than 2^31 modules");
  require(outputs.mask.ndim == 2 && outputs.mask.shape[0] == layers && outputs.mask.shape[1] == modules &&
              outputs.mask.dtype == DType::boolean && outputs.mask.is_contiguous(),
          "mask must be a contiguous [L, M] bool tensor");
  require(linear == nullptr || (linear->dtype == DType::f64 && same_shape(*linear, outputs.mask) &&
                                linear->is_contiguous() && linear->device == gradients.device),
          "linear must be a contiguous [L, M] float64 tensor");
  for (const TensorView* per_layer : {&outputs.before, &outputs.after, &outputs.swaps})
    require(per_layer->ndim == 1 && per_layer->shape[0] == layers && per_layer->is_contiguous() &&
                per_layer->dtype == (per_layer == &outputs.swaps ? DType::i64 : DType::f64) &&
                per_layer->device == gradients.device,
            "before, after and swaps must be contiguous [L] tensors of float64, float64 and int64");
  require(outputs.mask.device == gradients.device, "mask must be on the device of the gradients");
}

pymape::SwapMode swap_mode(const std::string& mode) {
  require(mode == "swap" || mode == "rearrange", "mode must be swap or rearrange");
  return mode == "swap" ? pymape::SwapMode::swap : pymape::SwapMode::rearrange;
}

void bind_greedy_swap(py::module_& m) {
  m.def(
      "greedy_swap",
      [](const TensorView& forget, const std::optional<TensorView>& retain, const std::optional<TensorView>& linear,
         double lam, std::int64_t max_swaps, const std::string& mode, const TensorView& mask, const TensorView& before,
         const TensorView& after, const TensorView& swaps, int num_threads) {
        const pymape::GreedySwapOutputs outputs{mask, before, after, swaps};
        const TensorView* retain_view = retain ? &*retain : nullptr;
        const TensorView* linear_view = linear ? &*linear : nullptr;
        for (const TensorView* gradients : {&forget, retain_view ? retain_view : &forget})
          require(gradients->ndim == 3 && gradients->shape[0] > 0 && gradients->shape[1] == forget.shape[1] &&
                      gradients->shape[2] == forget.shape[2] && gradients->dtype <= DType::f16 &&
                      gradients->device == kCpu,
                  "forget and retain must be floating point [N, L, M] CPU tensors with at least one sample");
        check_greedy_swap_outputs(forget, forget.shape[1], forget.shape[2], linear_view, outputs);
        const pymape::SwapMode chosen = swap_mode(mode);
        py::gil_scoped_release release;
        pymape::greedy_swap(forget, retain_view, linear_view, lam, max_swaps, chosen, outputs, num_threads);
      },
      py::arg("forget"), py::arg("retain"), py::arg("linear"), py::arg("lam"), py::arg("max_swaps"), py::arg("mode"),
      py::arg("mask"), py::arg("before"), py::arg("after"), py::arg("swaps"), py::arg("num_threads"));
#ifdef PYMAPE_CUDA
  m.def(
      "greedy_swap_cuda",
      [](const TensorView& rows, std::int64_t forget_samples, std::int64_t retain_samples,
         const std::optional<TensorView>& linear, double lam, std::int64_t max_swaps, const std::string& mode,
         const TensorView& mask, const TensorView& before, const TensorView& after, const TensorView& swaps,
         const TensorView& workspace, std::uintptr_t stream) {
        const pymape::GreedySwapOutputs outputs{mask, before, after, swaps};
        const TensorView* linear_view = linear ? &*linear : nullptr;
        require(rows.ndim == 3 && rows.is_contiguous() && (rows.dtype == DType::f32 || rows.dtype == DType::f64) &&
                    rows.device != kCpu,
                "rows must be a contiguous [L, M, N] CUDA tensor of float32 or float64");
        require(reinterpret_cast<std::uintptr_t>(rows.data) % 16 == 0 &&
                    rows.shape[2] % (rows.dtype == DType::f32 ? 4 : 2) == 0,
                "every row must begin at a multiple of 16 bytes");
        require(forget_samples > 0 && retain_samples >= 0 && forget_samples + retain_samples <= rows.shape[2],
                "forget_samples and retain_samples must add up to at most N");
        check_greedy_swap_outputs(rows, rows.shape[0], rows.shape[1], linear_view, outputs);
        require(workspace.ndim == 2 && workspace.is_contiguous() && workspace.dtype == DType::f64 &&
                    workspace.device == rows.device && workspace.shape[0] == rows.shape[0] &&
                    workspace.shape[1] == pymape::greedy_swap_workspace(rows.shape[1], rows.shape[2]),
                "workspace must be a contiguous [L, greedy_swap_workspace(M, N)] float64 tensor");
        const pymape::SwapMode chosen = swap_mode(mode);
        py::gil_scoped_release release;
        pymape::greedy_swap_cuda(rows, forget_samples, retain_samples, linear_view, lam, max_swaps, chosen, outputs,
                                 workspace, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("rows"), py::arg("forget_samples"), py::arg("retain_samples"), py::arg("linear"), py::arg("lam"),
      py::arg("max_swaps"), py::arg("mode"), py::arg("mask"), py::arg("before"), py::arg("after"), py::arg("swaps"),
      py::arg("workspace"), py::arg("stream"));
  m.def("greedy_swap_workspace", &pymape::greedy_swap_workspace, py::arg("modules"), py::arg("samples"));
#endif
}

bool is_rows(const TensorView& x, const TensorView& like) {
  return x.ndim == 3 && same_shape(x, like) && x.dtype == like.dtype && x.device == like.device &&
         (x.shape[2] <= 1 || x.strides[2] == 1);
}

pymape::ActivationInput check_masked_activation(const TensorView& pre, const OptionalView& bias, const OptionalView& up,
                                                const OptionalView& up_bias, const OptionalView& gate, int activation) {
  require(pre.ndim == 3 && pre.dtype <= DType::f16 && is_rows(pre, pre),
          "pre must be a floating point [B, T, F] tensor, contiguous in F");
  require(!up || is_rows(*up, pre), "up must be like pre");
  const std::int64_t filters = pre.shape[2];
  for (const OptionalView* vector : {&bias, &up_bias, &gate})
    require(!*vector || ((*vector)->dtype == accumulator(pre.dtype) && (*vector)->device == pre.device),
            "bias, up_bias and gate must have the accumulator dtype and the device of pre");
  for (const OptionalView* vector : {&bias, &up_bias})
    require(!*vector || ((*vector)->ndim == 1 && (*vector)->shape[0] == filters && (*vector)->is_contiguous()),
            "bias and up_bias must be contiguous [F] tensors");
  require(!gate || (gate->ndim == 2 && gate->shape[0] == pre.shape[0] && gate->shape[1] == filters &&
                    (filters <= 1 || gate->strides[1] == 1)),
          "gate must be a [B, F] tensor, contiguous in F");
  require(0 <= activation && activation <= static_cast<int>(pymape::Activation::silu), "unknown activation");
  return {pre, bias, up, up_bias, gate, static_cast<pymape::Activation>(activation)};
}

void check_masked_activation_result(const TensorView& pre, const TensorView& result) {
  require(is_rows(result, pre) && result.is_contiguous(), "the result must be contiguous and like pre");
}

void check_masked_activation_gradients(const TensorView& grad, const TensorView& pre,
                                       const pymape::ActivationGradients& out) {
  require(is_rows(grad, pre), "grad must be like pre");
  if (out.d_pre) check_masked_activation_result(pre, *out.d_pre);
  if (out.d_up) check_masked_activation_result(pre, *out.d_up);
  require(!out.scores || (out.scores->ndim == 2 && (out.scores->shape[0] == pre.shape[0] || out.scores->shape[0] == 1) &&
                          out.scores->shape[1] == pre.shape[2] && out.scores->is_contiguous() &&
                          out.scores->dtype == accumulator(pre.dtype) && out.scores->device == pre.device),
          "scores must be a contiguous [B, F] or [1, F] tensor of the accumulator dtype");
}

void bind_masked_ffn(py::module_& m) {
  m.def(
      "masked_activation",
      [](const TensorView& pre, const OptionalView& bias, const OptionalView& up, const OptionalView& up_bias,
         const OptionalView& gate, int activation, const TensorView& result, int num_threads) {
        const auto in = check_masked_activation(pre, bias, up, up_bias, gate, activation);
        check_masked_activation_result(pre, result);
        require(pre.device == kCpu, "masked_activation takes CPU tensors");
        py::gil_scoped_release release;
        pymape::masked_activation(in, result, num_threads);
      },
      py::arg("pre"), py::arg("bias"), py::arg("up"), py::arg("up_bias"), py::arg("gate"), py::arg("activation"),
      py::arg("result"), py::arg("num_threads"));
  m.def(
      "masked_activation_backward",
      [](const TensorView& grad, const TensorView& pre, const OptionalView& bias, const OptionalView& up,
         const OptionalView& up_bias, const OptionalView& gate, int activation, const OptionalView& d_pre,
         const OptionalView& d_up, const OptionalView& scores, int num_threads) {
        const auto in = check_masked_activation(pre, bias, up, up_bias, gate, activation);
        const pymape::ActivationGradients out{d_pre, d_up, scores};
        check_masked_activation_gradients(grad, pre, out);
        require(pre.device == kCpu, "masked_activation_backward takes CPU tensors");
        py::gil_scoped_release release;
        pymape::masked_activation_backward(grad, in, out, num_threads);
      },
      py::arg("grad"), py::arg("pre"), py::arg("bias"), py::arg("up"), py::arg("up_bias"), py::arg("gate"),
      py::arg("activation"), py::arg("d_pre"), py::arg("d_up"), py::arg("scores"), py::arg("num_threads"));
#ifdef PYMAPE_CUDA
  m.def(
      "masked_activation_cuda",
      [](const TensorView& pre, const OptionalView& bias, const OptionalView& up, const OptionalView& up_bias,
         const OptionalView& gate, int activation, const TensorView& result, std::uintptr_t stream) {
        const auto in = check_masked_activation(pre, bias, up, up_bias, gate, activation);
        check_masked_activation_result(pre, result);
        require(pre.device != kCpu, "masked_activation_cuda takes CUDA tensors");
        py::gil_scoped_release release;
        pymape::masked_activation_cuda(in, result, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("pre"), py::arg("bias"), py::arg("up"), py::arg("up_bias"), py::arg("gate"), py::arg("activation"),
      py::arg("result"), py::arg("stream"));
  m.def(
      "masked_activation_backward_cuda",
      [](const TensorView& grad, const TensorView& pre, const OptionalView& bias, const OptionalView& up,
         const OptionalView& up_bias, const OptionalView& gate, int activation, const OptionalView& d_pre,
         const OptionalView& d_up, const OptionalView& scores, const OptionalView& workspace, std::uintptr_t stream) {
        const auto in = check_masked_activation(pre, bias, up, up_bias, gate, activation);
        const pymape::ActivationGradients out{d_pre, d_up, scores};
        check_masked_activation_gradients(grad, pre, out);
        require(pre.device != kCpu, "masked_activation_backward_cuda takes CUDA tensors");
        require(!scores || (workspace && workspace->ndim == 3 && workspace->is_contiguous() &&
                            workspace->dtype == scores->dtype && workspace->device == pre.device &&
                            workspace->shape[0] == pre.shape[0] && workspace->shape[1] >= 1 &&
                            workspace->shape[1] <= 65535 && workspace->shape[2] == pre.shape[2]),
                "scores need a contiguous [B, splits, F] workspace of their dtype");
        py::gil_scoped_release release;
        pymape::masked_activation_backward_cuda(grad, in, out, workspace, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("grad"), py::arg("pre"), py::arg("bias"), py::arg("up"), py::arg("up_bias"), py::arg("gate"),
      py::arg("activation"), py::arg("d_pre"), py::arg("d_up"), py::arg("scores"), py::arg("workspace"),
      py::arg("stream"));
#endif
}

bool all_in_range(const TensorView& x, std::int64_t end) {
  const auto* values = x.as<std::int64_t>();
  return std::all_of(values, values + x.numel(), [end](std::int64_t value) { return 0 <= value && value < end; });
}

void check_simulate_deletions(const pymape::DeletionSystem& system, const pymape::DeletionRuns& runs) {
  for (const TensorView* x : {&system.sequences, &system.alias, &system.threshold, &runs.first_dead, &runs.all_dead,
                              &runs.distinct, &runs.depth, &runs.live})
    require(x->dtype == DType::i64 && x->device == kCpu && x->is_contiguous(), "simulate_deletions takes contiguous int64");
  const TensorView& sequences = system.sequences;
  require(sequences.ndim == 3 && sequences.numel() > 0 && all_in_range(sequences, sequences.shape[2]),
          "sequences must be an [m, B, L] tensor of slices");
  const std::int64_t cells = sequences.shape[0] * sequences.shape[2];
  for (const TensorView* table : {&system.alias, &system.threshold})
    require(table->ndim == 1 && table->shape[0] == cells, "alias and threshold must be [m * L] tensors");
  require(all_in_range(system.alias, cells), "alias must hold cells");
  for (const TensorView* per_run : {&runs.first_dead, &runs.all_dead, &runs.distinct})
    require(per_run->ndim == 1 && same_shape(*per_run, runs.all_dead), "outputs of every run must be [R] tensors");
  require(runs.depth.ndim == 1 && runs.depth.shape[0] >= 1 && same_shape(runs.depth, runs.live),
          "depth and live must be [C + 1] tensors");
}

void bind_simulate_deletions(py::module_& m) {
  m.def(
      "simulate_deletions",
      [](const TensorView& sequences, const TensorView& alias, const TensorView& threshold, std::int64_t max_requests,
         std::uint64_t seed, const TensorView& first_dead, const TensorView& all_dead, const TensorView& distinct,
         const TensorView& depth, const TensorView& live, int num_threads) {
        const pymape::DeletionSystem system{sequences, alias, threshold};
        const pymape::DeletionRuns runs{first_dead, all_dead, distinct, depth, live};
        check_simulate_deletions(system, runs);
        py::gil_scoped_release release;
        pymape::simulate_deletions(system, max_requests, seed, runs, num_threads);
      },
      py::arg("sequences"), py::arg("alias"), py::arg("threshold"), py::arg("max_requests"), py::arg("seed"),
      py::arg("first_dead"), py::arg("all_dead"), py::arg("distinct"), py::arg("depth"), py::arg("live"),
      py::arg("num_threads"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pymape's native core: plain functions over tensor views, no dependency on torch's libraries";
#ifdef PYMAPE_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  bind_greedy_swap(m);
  bind_masked_attention(m);
  bind_masked_ffn(m);
  bind_module_scores(m);
  bind_simulate_deletions(m);
}
