// pybind11 caster from torch.Tensor to TensorView. It reads attributes only, so the core needs no torch header.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor_view.h"

namespace pymape {

// torch's dtype objects are singletons: comparing pointers costs nothing.
inline const std::array<PyObject*, 6>& torch_dtypes() {
  static const std::array<PyObject*, 6> dtypes = [] {
    const pybind11::module_ torch = pybind11::module_::import("torch");
    std::array<PyObject*, 6> found{};
    const char* names[] = {"float64", "float32", "bfloat16", "float16", "int64", "bool"};
    for (int i = 0; i < 6; ++i) found[i] = pybind11::object(torch.attr(names[i])).release().ptr();
    return found;
  }();
  return dtypes;
}

}  // namespace pymape

namespace pybind11::detail {

template <>
struct type_caster<pymape::TensorView> {
  PYBIND11_TYPE_CASTER(pymape::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (!hasattr(source, "data_ptr")) return false;
    const object dtype = source.attr("dtype");
    const auto& dtypes = pymape::torch_dtypes();
    std::size_t index = 0;
    while (index < dtypes.size() && dtypes[index] != dtype.ptr()) ++index;
    if (index == dtypes.size()) return false;

    const tuple shape = source.attr("shape");
    const tuple strides = source.attr("stride")();
    if (shape.size() > static_cast<std::size_t>(pymape::kMaxDims)) return false;
    value.dtype = static_cast<pymape::DType>(index);
    value.ndim = static_cast<int>(shape.size());
    for (int i = 0; i < value.ndim; ++i) {
      value.shape[i] = shape[i].cast<std::int64_t>();
      value.strides[i] = strides[i].cast<std::int64_t>();
    }
    value.data = reinterpret_cast<void*>(source.attr("data_ptr")().cast<std::uintptr_t>());
    value.device = pymape::kCpu;
    if (!source.attr("is_cpu").cast<bool>()) {
      if (!source.attr("is_cuda").cast<bool>()) return false;
      value.device = source.attr("device").attr("index").cast<int>();
    }
    return true;
  }
};

}  // namespace pybind11::detail
