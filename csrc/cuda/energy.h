#pragma once

#include "cuda/share.h"
#include "ops/energy_fuse.h"

namespace dynmm {

// The threads that an SM should hold, which bounds their registers; in fp64 arithmetic takes the
// time.
template <class T>
constexpr int resident() {
  return sizeof(T) == 8 ? 512 : 1024;
}

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
