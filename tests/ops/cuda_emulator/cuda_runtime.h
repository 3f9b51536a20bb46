// Runs CUDA kernels on the CPU, thread by thread, so that their logic can be tested without a GPU.
//
// Blocks run one after the other. The threads of a block are fibers of one OS thread; a fiber runs
// until it reaches a barrier or the end. Each round resumes them in another order, so a missing
// barrier shows. Not emulated: the memory model, divergence within a warp operation, performance.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = void*;
using std::abs;
using std::exp;
using std::isfinite;
using std::isnan;
using std::log;
using std::log1p;
using std::max;
using std::min;

// Of a number and NaN these give the number.
inline float max(float a, float b) { return std::fmax(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Config {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes;
  cudaStream_t stream;
};

struct Barrier {
  unsigned members = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t exchange[kWarp];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  unsigned index = 0;
  bool done = false;
};

struct Block {
  dim3 grid, index;
  unsigned threads = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<uint64_t> shared;
  std::function<void()> kernel;
  ucontext_t scheduler;
  Fiber* running = nullptr;
};

inline Block*& block() {
  static Block* current = nullptr;
  return current;
}

inline void yield() { swapcontext(&block()->running->context, &block()->scheduler); }

inline void release_if_full(Barrier& barrier) {
  if (barrier.members > 0 && barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

inline void wait(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  ++barrier.arrived;
  release_if_full(barrier);
  while (barrier.generation == generation) yield();
}

inline Warp& warp() { return block()->warps[block()->running->index / kWarp]; }
inline unsigned lane() { return block()->running->index % kWarp; }

inline void fiber_main() {
  Block& own = *block();
  own.kernel();
  own.running->done = true;
  for (Barrier* barrier : {&own.barrier, &warp().barrier}) {  // those who left are not waited for
    --barrier->members;
    release_if_full(*barrier);
  }
  yield();
}

inline void run_block(Block& own, unsigned& round) {
  own.fibers = std::vector<Fiber>(own.threads);
  own.warps = std::vector<Warp>((own.threads + kWarp - 1) / kWarp);
  own.barrier = Barrier{own.threads};
  for (unsigned t = 0; t < own.threads; ++t) {
    Fiber& fiber = own.fibers[t];
    fiber.index = t;
    ++own.warps[t / kWarp].barrier.members;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (bool left = true; left;) {
    left = false;
    ++round;
    for (unsigned i = 0; i < own.threads; ++i) {
      const unsigned turned = (i + round * 7919) % own.threads;
      Fiber& fiber = own.fibers[round % 2 ? turned : own.threads - 1 - turned];
      if (fiber.done) continue;
      left = true;
      own.running = &fiber;
      swapcontext(&own.scheduler, &fiber.context);
    }
  }
}

inline void launch(const Config& config, const std::function<void()>& kernel) {
  static unsigned round = 0;
  Block own;
  own.grid = config.grid;
  own.threads = config.threads;
  own.kernel = kernel;
  block() = &own;
  for (unsigned y = 0; y < config.grid.y; ++y) {
    for (unsigned x = 0; x < config.grid.x; ++x) {
      own.index = dim3(x, y, 0);
      own.shared.assign(config.shared_bytes / 8 + 1, 0xdeadbeefdeadbeefull);
      run_block(own, round);
    }
  }
  block() = nullptr;
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(block()->shared.data());
}

// All lanes of the warp hand in a value; f sees all of them.
template <class T, class F>
auto exchange(T value, const F& f) {
  Warp& own = warp();
  std::memcpy(&own.exchange[lane()], &value, sizeof(T));
  wait(own.barrier);
  const auto result = f([&own](unsigned other) {
    T theirs;
    std::memcpy(&theirs, &own.exchange[other], sizeof(T));
    return theirs;
  });
  wait(own.barrier);
  return result;
}

}  // namespace emulator

#define threadIdx (dim3(emulator::block()->running->index, 0, 0))
#define blockIdx (emulator::block()->index)
#define blockDim (dim3(emulator::block()->threads))
#define gridDim (emulator::block()->grid)

inline void __syncthreads() { emulator::wait(emulator::block()->barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::wait(emulator::warp().barrier); }

inline unsigned __ballot_sync(unsigned, bool predicate) {
  return emulator::exchange(predicate, [](const auto& of) {
    unsigned bits = 0;
    for (unsigned l = 0; l < emulator::warp().barrier.members; ++l) bits |= unsigned(of(l)) << l;
    return bits;
  });
}

template <class T>
unsigned __match_any_sync(unsigned, T value) {
  return emulator::exchange(value, [value](const auto& of) {
    unsigned bits = 0;
    for (unsigned l = 0; l < emulator::warp().barrier.members; ++l) {
      bits |= unsigned(of(l) == value) << l;
    }
    return bits;
  });
}

template <class T>
T __shfl_sync(unsigned, T value, unsigned from) {
  return emulator::exchange(value, [from](const auto& of) { return of(from); });
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  const unsigned own = emulator::lane();
  return emulator::exchange(value,
                            [=](const auto& of) { return own < step ? value : of(own - step); });
}

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned step) {
  const unsigned own = emulator::lane();
  return emulator::exchange(value, [=](const auto& of) {
    return own + step >= emulator::kWarp ? value : of(own + step);
  });
}

template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  const unsigned own = emulator::lane();
  return emulator::exchange(value, [=](const auto& of) { return of(own ^ mask); });
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

template <class T>
T atomicMin(T* address, T value) {
  const T before = *address;
  *address = std::min(before, value);
  return before;
}
