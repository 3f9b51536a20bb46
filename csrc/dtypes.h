#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace dynmm {

using torch::headeronly::ScalarType;

// fp32 accumulates fp16, bf16 and fp32; fp64 accumulates itself; integers wrap around.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double,
                                       std::conditional_t<std::is_integral_v<T>, int64_t, float>>;

inline bool accumulates_in_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::ComplexFloat;
}

inline bool accumulates_in_double(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::ComplexDouble;
}

inline bool is_complex(ScalarType dtype) {
  return dtype == ScalarType::ComplexFloat || dtype == ScalarType::ComplexDouble;
}

// Those with arithmetic: what can be weighted, and what can be summed.
inline bool is_weighted(ScalarType dtype) {
  return accumulates_in_float(dtype) || accumulates_in_double(dtype);
}

inline bool is_floating(ScalarType dtype) { return is_weighted(dtype) && !is_complex(dtype); }

inline bool is_summed(ScalarType dtype) {
  // uint8, int8, int16, int32, int64
  return is_weighted(dtype) || dtype <= ScalarType::Long;
}

// Of weights and of row dots.
inline ScalarType weight_dtype(ScalarType dtype) {
  return accumulates_in_double(dtype) ? ScalarType::Double : ScalarType::Float;
}

inline int64_t reals_per_element(ScalarType dtype) { return is_complex(dtype) ? 2 : 1; }

// Calls f(T{}) with the C++ type of a dtype that is_weighted. Complex numbers go as pairs of real
// ones, which is exact for sums, for real weights and for the real part of an inner product.
template <class F>
auto visit_weighted(ScalarType dtype, const F& f) -> decltype(f(float{})) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return f(double{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    default:
      return f(float{});
  }
}

// As visit_weighted, for a dtype that is_summed.
template <class F>
auto visit_summed(ScalarType dtype, const F& f) -> decltype(f(float{})) {
  switch (dtype) {
    case ScalarType::Long:
      return f(int64_t{});
    case ScalarType::Int:
      return f(int32_t{});
    case ScalarType::Short:
      return f(int16_t{});
    case ScalarType::Char:
      return f(int8_t{});
    case ScalarType::Byte:
      return f(uint8_t{});
    default:
      return visit_weighted(dtype, f);
  }
}

}  // namespace dynmm
