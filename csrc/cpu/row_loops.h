#pragma once

#include <cstdint>

#include "dtypes.h"

namespace dynmm {

template <class T>
struct Term {
  const T* row;
  Accumulator<T> weight;
};

// Loops over the elements of a row, for T double, float, Half and BFloat16. Every instruction set
// makes the same bits of them, but for what is carried in a nan.
template <class T, class A = Accumulator<T>>
struct RowLoops {
  // to = weight * from
  void (*scale)(const T* from, A weight, int64_t size, T* to);
  // to = 0 + the terms, each times its weight, in their order
  void (*sum_terms)(const Term<T>* terms, int64_t count, int64_t size, T* to);
  // to = s * x + t * y; [0]: one s and one t for all elements, [1]: one each
  void (*scale_and_add[2])(const T* x, const T* y, const A* s, const A* t, int64_t size, T* to);
  // to = scale * from + shift, likewise
  void (*scale_and_shift[2])(const T* from, const A* scale, const A* shift, int64_t size, T* to);
  // The sum of x, or where y is given of x * y.
  double (*sum_run)(const T* x, const T* y, int64_t size);
  // sums[c] = that sum over elements c, c + channels, ...: one of each pixel; size: of sums.
  void (*sum_span)(const T* x, const T* y, int64_t pixels, int64_t channels, int64_t size,
                   double* sums);
};

constexpr int64_t kSpan = 256;  // the most channels that sum_span takes

// Those for the best instruction set.
template <class T>
RowLoops<T> row_loops();

}  // namespace dynmm
