#pragma once

#include "cuda/reduce.h"
#include "ops/energy_fuse.h"

namespace dynmm {

constexpr int kLongRow = 512;  // threads for a row that is more than they keep in registers

// The threads that an SM should hold, which bounds their registers. In fp64 arithmetic takes the
// time.
template <class T>
constexpr int resident(int threads) {
  return sizeof(T) == 8 ? 512 : threads;
}

// kLanes threads, side by side, share a row. It is cut into units of kValues; of each chunk a lane
// takes kUnits, kLanes apart. Lanes of a warp stay together, whatever rows they work on, for they
// shuffle together: who has nothing to do has no units.
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

// What is taken off before exp: the maximum, unless that is infinite, as in torch.logsumexp.
template <class A>
__device__ A base_of(A top) {
  return isfinite(top) ? top : A{0};
}

// The logsumexp of values that come chunk by chunk: their maximum, and the sum of exp(value -
// maximum). NaN comes through in the sum.
template <class S, class A>
struct LogSumExp {
  A top = -INFINITY, sum = 0;

  // value(u, v): those of a chunk; -inf outside of the row.
  template <class F>
  __device__ void add(typename S::Index first, typename S::Index stop, const F& value) {
    A most = top;
    S::all_values(first, stop, [&](int u, int v) { most = max(most, value(u, v)); });
    const A base = base_of(most);
    if (!S::kKept) sum *= exp(top - base);
    S::all_values(first, stop, [&](int u, int v) { sum += exp(value(u, v) - base); });
    top = most;
  }

  // Over all lanes.
  __device__ A value() const {
    const A base = base_of(S::most(top));
    return log(S::sum(sum * exp(top - base))) + base;
  }
};

template <class T>
__device__ bool is_present(const Judged<T>& call, int64_t n, int m) {
  return call.present == nullptr || call.present[n * call.modalities + m];
}

// The class of row n; -1 where there is none, or none of that number.
template <class S, class T>
__device__ typename S::Index class_of(const Judged<T>& call, int64_t n) {
  const int64_t named = call.named == nullptr ? -1 : call.named[n];
  return static_cast<typename S::Index>(0 <= named && named < call.classes ? named : -1);
}

// The labels of the piece that begins `offset` values behind the lane's first in a chunk of row n.
template <class S, class T, class A = Accumulator<T>, class P = Unit<A, S::template kPiece<A>>>
__device__ P labels_at(const Judged<T>& call, int64_t n, typename S::Index first, int offset) {
  const auto* row = call.labels + n * call.classes;
  return *reinterpret_cast<const P*>(row + (first + S::lane()) * S::kValues + offset);
}

// The weight of modality m of row n, whose energy this is. Lane m of each side asks for it, all
// lanes of a warp together; `here`: whether there is such a modality.
template <class S, class T, class A = Accumulator<T>>
__device__ A weight_of(const Judged<T>& call, int64_t n, int m, bool here, A energy) {
  const A confidence = call.scale * energy;
  if (call.weighting == kEnergy) return here ? confidence : A{0};
  if (call.weighting == kGiven) return here ? call.weights[n * call.modalities + m] : A{0};
  const A score = !here ? A{-INFINITY} : call.weighting == kSoftmax ? confidence : A{0};
  const A top = S::over(kMostModalities, score, [](A a, A b) { return max(a, b); });
  const A part = here ? exp(score - top) : A{0};
  const A total = S::over(kMostModalities, part, [](A a, A b) { return a + b; });
  return here ? part / total : A{0};
}

template <class T>
uint64_t bits_of(const Maps<const T>& rows, int64_t count) {
  return address_bits(rows.base) | (count > 1 ? static_cast<uint64_t>(rows.stride) * sizeof(T) : 0);
}

// Calls f(Share{}), the shorter the rows the fewer threads each. kBytes: what a lane of a warp
// keeps of a row, or one unit if that is more. `bits`: of all addresses but those in `call`.
template <int kBytes, class T, class F>
void visit_share(const Judged<T>& call, uint64_t bits, const F& f) {
  bits |= address_bits(call.labels) | static_cast<uint64_t>(call.classes) * sizeof(T);
  for (int m = 0; m < call.modalities; ++m) bits |= bits_of(call.logits[m], call.rows);
  visit_values<T>(bits, [&](auto values) {
    constexpr int kWanted = kBytes / static_cast<int>(sizeof(Accumulator<T>));
    constexpr int kValues = decltype(values)::value, kNarrow = std::min(kValues, kWanted);
    constexpr int kUnits = std::max(kWanted / kValues, 1), kFew = std::max(kUnits / 2, 1);
    if (call.classes <= 8 * kUnits * kValues) return f(Share<kValues, 8, kUnits>{});
    if (call.classes <= 16 * kUnits * kValues) return f(Share<kValues, 16, kUnits>{});
    if (call.classes <= kWarp * kUnits * kValues) return f(Share<kValues, kWarp, kUnits>{});
    if (call.classes <= kThreads * kFew * kNarrow) return f(Share<kNarrow, kThreads, kFew>{});
    f(Share<kNarrow, kLongRow, kFew>{});
  });
}

}  // namespace dynmm
