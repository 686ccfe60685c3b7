// What a kernel sees of a tensor: a pointer, a shape, strides in elements, an element type and a device.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

// Function multiversioning: the loader picks the widest version the processor has. It must sit on the function that holds
// the loop: a lambda or helper called from it is compiled once, for the baseline.
// GCC knows these architectures from version 12 on.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(__CUDACC__)
#define PYMAPE_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PYMAPE_MULTIVERSION
#endif

namespace pymape {

enum class DType : std::uint8_t { f64, f32, bf16, f16, i64, boolean };

constexpr int kMaxDims = 5;
constexpr int kCpu = -1;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int device = kCpu;  // CUDA device index, or kCpu
  int ndim = 0;
  std::array<std::int64_t, kMaxDims> shape{};
  std::array<std::int64_t, kMaxDims> strides{};  // in elements

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }

  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }

  bool is_contiguous() const {
    if (numel() == 0) return true;  // torch gives a tensor without elements any strides
    std::int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
};

// The bindings call this for everything memory safety depends on; the Python layer has already spoken to the user.
inline void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

}  // namespace pymape
