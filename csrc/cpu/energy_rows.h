#pragma once

// What the loops of energy_fuse and of its gradients share.

#include "cpu/exp.h"
#include "cpu/strips.h"

namespace dynmm {
namespace DYNMM_LEVEL {

constexpr int64_t kCached = 256 * 1024;  // bytes of logits that are read again

// Of the rows left, those that a unit takes, if it has as many lanes.
template <class T>
int64_t rows_at_once(const Judged<T>& call, int64_t left) {
  if (call.classes <= kFew) return left;
  const int64_t most = kCached / (call.classes * call.modalities * static_cast<int64_t>(sizeof(T)));
  return most < 1 ? 1 : most < left ? most : left;
}

// Numbers that the vectors of a row take.
template <class A>
int64_t padded(int64_t classes) {
  constexpr int64_t kLanes = Lanes<A>::kCount;
  return (classes + kLanes - 1) / kLanes * kLanes;
}

// Which of a unit's rows have which modalities, and what these weigh; a lane is 1 or 0 in `here`.
template <class A>
struct Weighed {
  Lanes<A> here[kMostModalities], confidence[kMostModalities], weight[kMostModalities];
};

template <class T, class A = Accumulator<T>>
DYNMM_APART void find_present(const Judged<T>& call, const Unit<A>& unit, Weighed<A>& weighed) {
  for (int m = 0; m < call.modalities; ++m) {
    weighed.here[m] =
        call.present == nullptr ? all(A{1}) : unit.column(call.present, call.modalities, m);
  }
}

template <class T, class A = Accumulator<T>>
DYNMM_APART void weigh(const Judged<T>& call, const Unit<A>& unit, Weighed<A>& weighed) {
  const Lanes<A> zero = all(A{0}), one = all(A{1});
  const int modalities = call.modalities;
  const auto &here = weighed.here, &confidence = weighed.confidence;
  auto& weight = weighed.weight;
  if (call.weighting == kUniform || call.weighting == kSoftmax) {
    Lanes<A> largest = all(-Number<A>::kInfinity), sum = zero;
    for (int m = 0; m < modalities; ++m) {
      largest = if_equal(here[m], one, larger(confidence[m], largest), largest);
    }
    for (int m = 0; m < modalities; ++m) {
      weight[m] = call.weighting == kUniform ? one : exp(confidence[m] - largest);
      sum = sum + if_equal(here[m], one, weight[m], zero);
    }
    for (int m = 0; m < modalities; ++m) weight[m] = weight[m] / sum;
  }
  for (int m = 0; m < modalities; ++m) {
    if (call.weighting == kEnergy) weight[m] = confidence[m];
    if (call.weighting == kGiven) weight[m] = unit.column(call.weights, modalities, m);
    weight[m] = if_equal(here[m], one, weight[m], zero);
  }
}

// The sum of the modalities' logits at vector k of a piece.
template <class A>
DYNMM_INLINE Lanes<A> fused_at(int64_t k, const Strip<A> logits[], const Lanes<A> weights[],
                               int modalities) {
  Lanes<A> sum = weights[0] * logits[0][k];
  for (int m = 1; m < modalities; ++m) sum = sum + weights[m] * logits[m][k];
  return sum;
}

// 1, or nan in the lanes of rows that name no class.
template <class T, class A = Accumulator<T>>
DYNMM_INLINE Lanes<A> existing(const Judged<T>& call, const Unit<A>& unit) {
  Lanes<A> fine = all(A{1});
  if (call.named == nullptr) return fine;
  for (int l = 0; l < unit.count; ++l) {
    const int64_t named = call.named[unit.row + l];
    if (named < 0 || named >= call.classes) set_lane(static_cast<A>(__builtin_nan("")), l, fine);
  }
  return fine;
}

// Where a piece holds the class of its row, or of each of its rows, 0 for one that is none: vector
// k counts as k * step.
template <class A>
struct Hot {
  Lanes<A> vector;
  A step;

  template <class T>
  DYNMM_APART Hot(const Judged<T>& call, const Unit<A>& unit)
      : step(unit.turned ? 1 : Lanes<A>::kCount) {
    constexpr int kLanes = Lanes<A>::kCount;
    if (call.named == nullptr) return;
    A at[kLanes];
    for (int l = 0; l < (unit.turned ? unit.count : 1); ++l) {
      const int64_t named = call.named[unit.row + unit.piece + l];
      const int64_t behind = (named < 0 || named >= call.classes ? 0 : named) - unit.at;
      at[l] = behind < 0 || behind >= unit.size ? A{-1} - kLanes : static_cast<A>(behind);
    }
    if (unit.turned) {
      for (int l = unit.count; l < kLanes; ++l) at[l] = A{-1};
      vector = load(at);
    } else {
      vector = all(at[0]) - numbered<A>();
    }
  }

  // x in the lane that holds the class at vector k, else y.
  DYNMM_INLINED Lanes<A> choose(int64_t k, const Lanes<A>& x, const Lanes<A>& y) const {
    return if_equal(vector, all(static_cast<A>(k) * step), x, y);
  }
};

}  // namespace DYNMM_LEVEL
}  // namespace dynmm
