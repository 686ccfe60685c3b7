// What every CUDA launcher shares: the device of a view, error checks, element conversions, 16-byte loads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "tensor_view.h"

namespace pymape {

inline void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a view's device current for the launcher's lifetime and puts the caller's back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda_check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) cuda_check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

template <typename ACC, typename T>
__device__ __forceinline__ ACC to_acc(T value) {
  return static_cast<ACC>(value);
}
template <>
__device__ __forceinline__ float to_acc<float, __nv_bfloat16>(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__device__ __forceinline__ float to_acc<float, __half>(__half value) {
  return __half2float(value);
}

template <typename T, typename ACC>
__device__ __forceinline__ T from_acc(ACC value) {
  return static_cast<T>(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16, float>(float value) {
  return __float2bfloat16(value);
}
template <>
__device__ __forceinline__ __half from_acc<__half, float>(float value) {
  return __float2half(value);
}

// N elements moved by one load or store; N * sizeof(T) is at most 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

// Assigning a pack compiles to stores of 4 bytes each; this is one store of 16 where it has 16.
template <typename T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
#ifdef __CUDACC__
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    uint4 raw;
    memcpy(&raw, &pack, sizeof(raw));
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(raw.x), "r"(raw.y),
                 "r"(raw.z), "r"(raw.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Stores values of any number side by side, in packs of 16 bytes where there are so many.
template <typename T, int N>
__device__ __forceinline__ void store_vector(T* to, const T (&values)[N]) {
  constexpr int kPack = N * sizeof(T) < 16 ? N : 16 / sizeof(T);
  static_assert(N % kPack == 0);
#pragma unroll
  for (int first = 0; first < N; first += kPack) {
    Pack<T, kPack> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.values[i] = values[first + i];
    store_pack(to + first, pack);
  }
}

inline bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

}  // namespace pymape
