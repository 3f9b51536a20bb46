#pragma once

// The loops over rows, compiled for the instruction set of the file that includes this.
//
// Short sums go to a double in an order that never changes.

#include "cpu/row_lanes.h"
#include "cpu/row_loops.h"

namespace dynmm {
namespace DYNMM_LEVEL {

constexpr int64_t kShort = 16;  // terms added up before they go to a double
constexpr int64_t kFewElements = DYNMM_VECTOR_BYTES == 64 ? 2 : 8;
constexpr int64_t kSumLanes = 16;  // sums of a run that advance side by side

template <class T, class A = Accumulator<T>>
void scale(const T* from, A weight, int64_t size, T* to) {
  const Lanes<A> w = all(weight);
  at_least_once<A>(size,
                   [&](const auto& lanes) DYNMM_INLINED { lanes.write(w * lanes.read(from), to); });
}

template <class T, class A = Accumulator<T>>
void sum_terms(const Term<T>* terms, int64_t count, int64_t size, T* to) {
  if (size < kFewElements) {
    for (int64_t i = 0; i < size; ++i) {
      A sum = 0, value;
      for (int64_t j = 0; j < count; ++j) {
        widen(terms[j].row + i, 1, &value);
        sum += terms[j].weight * value;
      }
      narrow(&sum, 1, to + i);
    }
    return;
  }
  at_least_once<A>(size, [&](const auto& lanes) DYNMM_INLINED {
    Lanes<A> sum = all(A{0});
    for (int64_t j = 0; j < count; ++j) {
      sum = sum + all(terms[j].weight) * lanes.read(terms[j].row);
    }
    lanes.write(sum, to);
  });
}

template <bool kEach, class A, class L>
DYNMM_INLINE Lanes<A> factors(const A* from, const L& lanes) {
  if constexpr (kEach) {
    return lanes.read(from);
  } else {
    return all(*from);
  }
}

template <bool kEach, class T, class A = Accumulator<T>>
void scale_and_add(const T* x, const T* y, const A* s, const A* t, int64_t size, T* to) {
  at_least_once<A>(size, [&](const auto& lanes) DYNMM_INLINED {
    lanes.write(factors<kEach>(s, lanes) * lanes.read(x) + factors<kEach>(t, lanes) * lanes.read(y),
                to);
  });
}

template <bool kEach, class T, class A = Accumulator<T>>
void scale_and_shift(const T* from, const A* scale, const A* shift, int64_t size, T* to) {
  at_least_once<A>(size, [&](const auto& lanes) DYNMM_INLINED {
    lanes.write(factors<kEach>(scale, lanes) * lanes.read(from) + factors<kEach>(shift, lanes), to);
  });
}

template <bool kProduct, class T, class L>
DYNMM_INLINE auto term(const T* x, const T* y, const L& lanes) {
  if constexpr (kProduct) {
    return lanes.read(x) * lanes.read(y);
  } else {
    return lanes.read(x);
  }
}

// Four terms at a time: loads then keep up with memory.
template <bool kProduct, class T>
DYNMM_INLINE auto four(const T* x, const T* y, int64_t at, int64_t step) {
  const auto value = [&](int64_t i) DYNMM_INLINED { return term<kProduct>(x, y, Whole{i}); };
  return (value(at) + value(at + step)) + (value(at + 2 * step) + value(at + 3 * step));
}

template <bool kProduct, class T, class A = Accumulator<T>>
double sum_of_run(const T* x, const T* y, int64_t size) {
  constexpr int64_t kCount = Lanes<A>::kCount;
  double sum = 0;
  A lane[kSumLanes];
  int64_t i = 0;
  while (i + 4 * kSumLanes <= size) {
    const int64_t longest = i + kShort * kSumLanes, stop = longest < size ? longest : size;
    Lanes<A> part[kSumLanes / kCount];
    for (auto& p : part) p = all(A{0});
    for (; i + 4 * kSumLanes <= stop; i += 4 * kSumLanes) {
      for (int64_t l = 0; l < kSumLanes; l += kCount) {
        part[l / kCount] = part[l / kCount] + four<kProduct>(x, y, i + l, kSumLanes);
      }
    }
    __builtin_memcpy(lane, part, sizeof(lane));
    for (const A value : lane) sum += static_cast<double>(value);
  }
  for (; i < size; i += kCount) {
    const int64_t count = kCount < size - i ? kCount : size - i;
    store(count == kCount ? term<kProduct>(x, y, Whole{i}) : term<kProduct>(x, y, Fewer{i, count}),
          lane);
    for (int64_t l = 0; l < count; ++l) sum += static_cast<double>(lane[l]);
  }
  return sum;
}

template <bool kProduct, class T, class A = Accumulator<T>>
void sums_of_span(const T* x, const T* y, int64_t pixels, int64_t channels, int64_t size,
                  double* sums) {
  for (int64_t c = 0; c < size; ++c) sums[c] = 0;
  A part[kSpan];
  int64_t p = 0;
  const auto add = [&] {
    for (int64_t c = 0; c < size; ++c) sums[c] += static_cast<double>(part[c]);
  };
  const auto value = [&](const auto& lanes, int64_t pixel) DYNMM_INLINED {
    return term<kProduct>(x + pixel * channels, y + (kProduct ? pixel * channels : 0), lanes);
  };
  while (p + 4 <= pixels) {
    for (int64_t c = 0; c < size; ++c) part[c] = A{0};
    const int64_t stop = p + kShort < pixels ? p + kShort : pixels;
    for (; p + 4 <= stop; p += 4) {
      once<A>(size, [&](const auto& lanes) DYNMM_INLINED {
        const auto sum =
            (value(lanes, p) + value(lanes, p + 1)) + (value(lanes, p + 2) + value(lanes, p + 3));
        lanes.write(lanes.read(part) + sum, part);
      });
    }
    add();
  }
  for (; p < pixels; ++p) {
    once<A>(size, [&](const auto& lanes) DYNMM_INLINED { lanes.write(value(lanes, p), part); });
    add();
  }
}

template <class T>
double sum_run(const T* x, const T* y, int64_t size) {
  return y != nullptr ? sum_of_run<true>(x, y, size) : sum_of_run<false>(x, y, size);
}

template <class T>
void sum_span(const T* x, const T* y, int64_t pixels, int64_t channels, int64_t size,
              double* sums) {
  auto* const run = y != nullptr ? sums_of_span<true, T> : sums_of_span<false, T>;
  run(x, y, pixels, channels, size, sums);
}

template <class T>
RowLoops<T> row_loops() {
  return {scale<T>,
          sum_terms<T>,
          {scale_and_add<false, T>, scale_and_add<true, T>},
          {scale_and_shift<false, T>, scale_and_shift<true, T>},
          sum_run<T>,
          sum_span<T>};
}

template RowLoops<double> row_loops<double>();
template RowLoops<float> row_loops<float>();
template RowLoops<Half> row_loops<Half>();
template RowLoops<BFloat16> row_loops<BFloat16>();

}  // namespace DYNMM_LEVEL
}  // namespace dynmm
