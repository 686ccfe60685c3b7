// CUDA on one CPU thread, for testing kernels without a GPU: as much of the runtime as the kernels in csrc/ use.
//
// A block's threads are fibers that run one after the other until each has come to a barrier or its end; blocks follow each
// other. What a GPU would do wrong in silence stops the process here with a message: a barrier that some threads never
// reach, a shuffle from a lane that has left. CUDA_EMULATOR_ORDER=reverse runs the threads from the last to the first, which
// a missing barrier does not survive.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes = 1024;
};

namespace emulator {

constexpr std::size_t kStack = 256 * 1024;
constexpr int kSharedMemory = 227 * 1024;
enum class State { ready, at_block_barrier, at_warp_barrier, done };

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulator: %s in block (%u, %u, %u), thread (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z);
  std::abort();
}

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::done;
  dim3 index;
  int number = 0;
  unsigned operations = 0;                             // of the warp, which this lane has taken part in
  std::array<std::array<unsigned char, 16>, 2> given;  // to the last two of them
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  int threads = 0;
  std::function<void()> kernel;
  std::vector<unsigned char> dynamic_shared;
  cudaError_t error = cudaSuccess;
};
inline Machine machine;

inline void enter() {
  machine.kernel();
  machine.running->state = State::done;
  swapcontext(&machine.running->context, &machine.scheduler);
}

inline void wait(State state) {
  Fiber* self = machine.running;
  self->state = state;
  swapcontext(&self->context, &machine.scheduler);
}

inline void resume(Fiber& fiber) {
  machine.running = &fiber;
  threadIdx = fiber.index;
  fiber.state = State::ready;
  swapcontext(&machine.scheduler, &fiber.context);
}

// Whether all of these that are not done wait for `state`, and at least one does; then they may go on.
inline bool release(int first, int last, State state) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    const State own = machine.fibers[i].state;
    if (own != state && own != State::done) return false;
    any = any || own == state;
  }
  for (int i = first; i < last; ++i)
    if (machine.fibers[i].state == state) machine.fibers[i].state = State::ready;
  return any;
}

inline void run_block() {
  const char* order = std::getenv("CUDA_EMULATOR_ORDER");
  const bool reversed = order != nullptr && std::strcmp(order, "reverse") == 0;
  std::fill(machine.dynamic_shared.begin(), machine.dynamic_shared.end(), 0xff);  // NaN
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.number = i, fiber.operations = 0, fiber.state = State::ready;
    fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  while (true) {
    bool progress = false, live = false;
    for (int i = 0; i < machine.threads; ++i) {
      Fiber& fiber = machine.fibers[reversed ? machine.threads - 1 - i : i];
      if (fiber.state == State::ready) resume(fiber), progress = true;
      live = live || fiber.state != State::done;
    }
    for (int first = 0; first < machine.threads; first += 32)
      progress = release(first, std::min(machine.threads, first + 32), State::at_warp_barrier) || progress;
    if (!live) return;
    progress = release(0, machine.threads, State::at_block_barrier) || progress;
    if (!progress) fail("a barrier that not all threads reach");
  }
}

template <typename Kernel>
void launch(dim3 grid, dim3 block, std::size_t shared, cudaStream_t, Kernel kernel) {
  const bool fits = block.x * block.y * block.z <= 1024 && grid.x >= 1 && grid.x <= 2147483647u && grid.y >= 1 &&
                    grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 && shared <= kSharedMemory;
  if (!fits) {
    machine.error = cudaErrorInvalidConfiguration;
    return;
  }
  gridDim = grid, blockDim = block;
  machine.threads = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(machine.fibers.size()) < machine.threads) machine.fibers.emplace_back();
  machine.kernel = kernel;
  machine.dynamic_shared.assign(shared, 0);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block();
      }
}

// Gives a value to an operation of the warp and waits until its other lanes have; returns the operation's parity.
template <typename T>
unsigned give(T value) {
  static_assert(sizeof(T) <= 16);
  Fiber* self = machine.running;
  const unsigned parity = self->operations++ % 2;
  std::memcpy(self->given[parity].data(), &value, sizeof(T));
  wait(State::at_warp_barrier);
  return parity;
}

template <typename T>
T take(unsigned parity, int lane) {
  const int number = machine.running->number / 32 * 32 + lane;
  if (number >= machine.threads) fail("a shuffle from a lane that does not exist");
  const Fiber& source = machine.fibers[number];
  if (source.state == State::done && source.operations < machine.running->operations)
    fail("a shuffle from a lane that has left");
  T value;
  std::memcpy(&value, source.given[parity].data(), sizeof(T));
  return value;
}

inline int lane() { return machine.running->number % 32; }

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::at_block_barrier); }
inline void __syncwarp() { emulator::give(0); }

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::take<T>(emulator::give(value), source);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::take<T>(emulator::give(value), emulator::lane() ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta, int width = 32) {
  const unsigned parity = emulator::give(value);
  const int lane = emulator::lane();
  return lane % width + delta < width ? emulator::take<T>(parity, lane + delta) : value;
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const unsigned parity = emulator::give<int>(vote);
  unsigned votes = 0;
  const int warp = emulator::machine.running->number / 32 * 32;
  for (int lane = 0; lane < 32 && warp + lane < emulator::machine.threads; ++lane)
    votes |= static_cast<unsigned>(emulator::take<int>(parity, lane)) << lane;
  return votes;
}
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }

template <typename T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = std::max(before, value);
  return before;
}
inline long long __double_as_longlong(double value) {
  long long bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return std::exchange(emulator::machine.error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulator::kSharedMemory, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  return *attributes = cudaFuncAttributes{}, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
