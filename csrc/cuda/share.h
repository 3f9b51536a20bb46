#pragma once

#include "cuda/reduce.h"

namespace dynmm {

constexpr int kLongRow = 512;  // threads for a row that is more than they keep in registers

// How kLanes threads, side by side, share a row. It is cut into units of kValues; of each chunk a
// lane takes kUnits, kLanes apart. Lanes of a warp stay together, whatever rows they work on, for
// they shuffle together: who has nothing to do has no units.
template <int kValues_, int kLanes, int kUnits_>
struct Share {
  static constexpr int kValues = kValues_, kUnits = kUnits_;
  static constexpr bool kKept = kLanes < kLongRow;               // a row is one chunk, read once
  static constexpr int kGroup = kKept ? kThreads : kLongRow;     // threads of a block
  static constexpr int kRows = kGroup / kLanes;                  // rows of a block
  static constexpr int kSide = kLanes < kWarp ? kLanes : kWarp;  // lanes in one warp
  static constexpr int kWarps = kLanes / kSide;
  template <class A>  // values in a unit, if no more than 16 bytes hold
  static constexpr int kPiece = kValues < kWideValues<A> ? kValues : kWideValues<A>;
  using Index = std::conditional_t<kKept, int, int64_t>;  // of units and columns

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }

  static __device__ int64_t row() {
    return static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kLanes;
  }

  // f(first unit) for each chunk.
  template <class F>
  static __device__ void chunks(Index units, const F& f) {
    if constexpr (kKept) {
      f(Index{0});
    } else {
      for (Index first = 0; first < units; first += kLanes * kUnits) f(first);
    }
  }

  // f(u, offset, inside) for the lane's own units of a chunk, and for some outside; `offset`: from
  // the first of them. What lies behind the end for all lanes is left out, four values at a time.
  template <class F>
  static __device__ void all_units(Index first, Index stop, const F& f) {
    constexpr int kStep = kValues < 4 ? 4 / kValues : 1;
    const Index left = stop - first - lane();
#pragma unroll
    for (int step = 0; step < kUnits; step += kStep) {
      if (step * kLanes >= stop - first) continue;
#pragma unroll
      for (int u = step; u < step + kStep && u < kUnits; ++u) {
        f(u, u * kLanes, u * kLanes < left);
      }
    }
  }

  // f(u, offset) for those within the row.
  template <class F>
  static __device__ void units(Index first, Index stop, const F& f) {
    all_units(first, stop, [&](int u, int offset, bool inside) {
      if (inside) f(u, offset);
    });
  }

  // The first of them, in a row that begins at `row`.
  template <class T,
            class U = std::conditional_t<
                std::is_const_v<T>, const Unit<std::remove_const_t<T>, kValues>, Unit<T, kValues>>>
  static __device__ U* own(T* row, Index first) {
    return reinterpret_cast<U*>(row) + (first + lane());
  }

  // f(u, v, offset), piece by piece of as many values as 16 bytes hold of A; `offset` in values.
  template <class A, class F>
  static __device__ void pieces(Index first, Index stop, const F& f) {
    units(first, stop, [&](int u, int offset) {
#pragma unroll
      for (int v = 0; v < kValues; v += kPiece<A>) f(u, v, offset * kValues + v);
    });
  }

  // f(u, v), value by value, also for some outside.
  template <class F>
  static __device__ void all_values(Index first, Index stop, const F& f) {
    all_units(first, stop, [&](int u, int, bool) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) f(u, v);
    });
  }

  // f(u, v) for those within the row.
  template <class F>
  static __device__ void values(Index first, Index stop, const F& f) {
    units(first, stop, [&](int u, int) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) f(u, v);
    });
  }

  // Writes of(u, v) to the lane's own units of a chunk.
  template <class T, class F>
  static __device__ void write(T* row, Index first, Index stop, const F& of) {
    auto* to = own(row, first);
    units(first, stop, [&](int u, int offset) {
      Unit<T, kValues> unit;
#pragma unroll
      for (int v = 0; v < kValues; ++v) unit.value[v] = static_cast<T>(of(u, v));
      to[offset] = unit;
    });
  }

  // The sum over all lanes, and the maximum: the same bits in each of them, every time.
  template <class A>
  static __device__ A sum(A own) {
    return joined(own, [](A a, A b) { return a + b; });
  }
  template <class A>
  static __device__ A most(A own) {
    return joined(own, [](A a, A b) { return max(a, b); });
  }

  // What lane m of each side has.
  template <class V>
  static __device__ V of_lane(int m, V own) {
    const unsigned lane = threadIdx.x % kWarp;
    return __shfl_sync(kAllLanes, own, lane - lane % kSide + m);
  }

  // join(a, b) over `count` lanes side by side, a power of two within a warp.
  template <class A, class F>
  static __device__ A over(int count, A own, const F& join) {
#pragma unroll
    for (int step = count / 2; step > 0; step /= 2) {
      own = join(own, __shfl_xor_sync(kAllLanes, own, step));
    }
    return own;
  }

 private:
  template <class A, class F>
  static __device__ A joined(A own, const F& join) {
    own = over(kSide, own, join);
    if constexpr (kWarps > 1) {
      __shared__ A parts[kWarps];
      __syncthreads();
      if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = own;
      __syncthreads();
      own = parts[0];
#pragma unroll 1
      for (int w = 1; w < kWarps; ++w) own = join(own, parts[w]);
    }
    return own;
  }
};

}  // namespace dynmm
