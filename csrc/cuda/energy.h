#pragma once

#include "cuda/reduce.h"
#include "ops/energy_fuse.h"

namespace dynmm {

constexpr int kLongRow = 512;  // threads for a row that is more than they keep in registers

// Threads of these kernels that an SM should hold. In fp64 arithmetic takes the time and registers.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 512 : 1280;

// kLanes threads, side by side, share a row. It is cut into units of kValues; of each chunk a lane
// takes kUnits, kLanes apart. Lanes of a warp stay together, whatever rows they work on, for they
// shuffle together: who has nothing to do has no units.
template <int kValues_, int kLanes, int kUnits_>
struct Share {
  static constexpr int kValues = kValues_, kUnits = kUnits_;
  static constexpr bool kKept = kLanes < kLongRow;  // a row is one chunk, read once
  static constexpr int kGroup = kKept ? kThreads : kLongRow;  // threads of a block
  static constexpr int kRows = kGroup / kLanes;               // rows of a block
  static constexpr int kWarps = ceil_div(kLanes, kWarp);
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

  // f(u, offset) for the lane's own units of a chunk; `offset`: from the first of them.
  template <class F>
  static __device__ void units(Index first, Index stop, const F& f) {
    const Index left = stop - first - lane();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u * kLanes < left) f(u, u * kLanes);
    }
  }

  // The first of them, in a row that begins at `row`.
  template <class T, class U = std::conditional_t<std::is_const_v<T>,
                                                  const Unit<std::remove_const_t<T>, kValues>,
                                                  Unit<T, kValues>>>
  static __device__ U* own(T* row, Index first) {
    return reinterpret_cast<U*>(row) + (first + lane());
  }

  // f(u, v), value by value.
  template <class F>
  static __device__ void values(Index first, Index stop, const F& f) {
    units(first, stop, [&](int u, int) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) f(u, v);
    });
  }

  // The sum over the lanes, and the maximum: the same bits in each of them, every time.
  template <class A>
  static __device__ A sum(A own) {
    return over_lanes(own, [](A a, A b) { return a + b; });
  }
  template <class A>
  static __device__ A most(A own) {
    return over_lanes(own, [](A a, A b) { return max(a, b); });
  }

 private:
  template <class A, class F>
  static __device__ A over_lanes(A own, const F& join) {
#pragma unroll
    for (int step = (kWarps > 1 ? kWarp : kLanes) / 2; step > 0; step /= 2) {
      own = join(own, __shfl_xor_sync(kAllLanes, own, step));
    }
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

  // value(u, v): those of a chunk.
  template <class F>
  __device__ void add(typename S::Index first, typename S::Index stop, const F& value) {
    A most = top;
    S::values(first, stop, [&](int u, int v) { most = max(most, value(u, v)); });
    const A base = base_of(most);
    sum *= exp(top - base);
    S::values(first, stop, [&](int u, int v) { sum += exp(value(u, v) - base); });
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

// f(u, v, label) for the lane's own labels of a chunk of row n, where there are labels.
template <class S, class T, class F>
__device__ void labels_of(const Judged<T>& call, int64_t n, typename S::Index first,
                          typename S::Index stop, const F& f) {
  using A = Accumulator<T>;
  constexpr int kPiece = S::kValues < kWideValues<A> ? S::kValues : kWideValues<A>;
  if (call.labels == nullptr) return;
  const A* row = call.labels + n * call.classes;
  const auto* own = reinterpret_cast<const Unit<A, kPiece>*>(S::own(row, first));
  S::units(first, stop, [&](int u, int offset) {
#pragma unroll
    for (int p = 0; p < S::kValues / kPiece; ++p) {
      const Unit<A, kPiece> piece = own[offset * (S::kValues / kPiece) + p];
#pragma unroll
      for (int v = 0; v < kPiece; ++v) f(u, p * kPiece + v, piece.value[v]);
    }
  });
}

// The weights of row n, once its energies are in memory.
template <class T, class A = Accumulator<T>>
class Weights {
 public:
  __device__ Weights(const Judged<T>& call, int64_t n, const A* energies)
      : call_(call), n_(n), energies_(energies + n * (call.modalities + 1)) {
    if (call.weighting != kSoftmax && call.weighting != kUniform) return;
    for (int m = 0; m < call.modalities; ++m) {
      if (is_present(call, n, m)) top_ = max(top_, score(m));
    }
    for (int m = 0; m < call.modalities; ++m) {
      if (is_present(call, n, m)) total_ += exp(score(m) - top_);
    }
  }

  __device__ A operator()(int m) const {
    if (!is_present(call_, n_, m)) return 0;
    if (call_.weighting == kGiven) return call_.weights[n_ * call_.modalities + m];
    return call_.weighting == kEnergy ? score(m) : exp(score(m) - top_) / total_;
  }

 private:
  // What the softmax is taken of.
  __device__ A score(int m) const {
    return call_.weighting == kUniform ? A{0} : call_.scale * energies_[m];
  }

  const Judged<T>& call_;
  int64_t n_;
  const A* energies_;
  A top_ = -INFINITY, total_ = 0;
};

template <class T>
uint64_t bits_of(const Maps<const T>& rows, int64_t count) {
  return address_bits(rows.base) |
         (count > 1 ? static_cast<uint64_t>(rows.stride) * sizeof(T) : 0);
}

// Calls f(Share{}), the shorter the rows the fewer threads each; `bits`: of all other addresses.
template <class T, class F>
void visit_share(const Judged<T>& call, uint64_t bits, const F& f) {
  constexpr int kEach = 32 / sizeof(Accumulator<T>);  // values that a lane keeps in registers
  bits |= address_bits(call.labels) | static_cast<uint64_t>(call.classes) * sizeof(T);
  for (int m = 0; m < call.modalities; ++m) bits |= bits_of(call.logits[m], call.rows);
  visit_values<T>(bits, [&](auto values) {
    constexpr int kValues = decltype(values)::value, kUnits = kEach / kValues;
    if (call.classes <= 8 * kEach) return f(Share<kValues, 8, kUnits>{});
    if (call.classes <= 16 * kEach) return f(Share<kValues, 16, kUnits>{});
    if (call.classes <= kWarp * kEach) return f(Share<kValues, kWarp, kUnits>{});
    if (call.classes <= kThreads * kEach) return f(Share<kValues, kThreads, kUnits>{});
    f(Share<kValues, kLongRow, kUnits>{});
  });
}

}  // namespace dynmm
