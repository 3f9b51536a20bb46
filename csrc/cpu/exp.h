#pragma once

// Exponential and logarithms to about one unit in the last place.

#include "cpu/simd.h"

namespace dynmm {
namespace DYNMM_LEVEL {

// kExp: (e^r - 1 - r) / r^2 in r, |r| <= log(2) / 2. kLog: (2 atanh(z) - 2 z) / z^3 in z^2,
// 0 <= z <= 1/3. Both interpolated at Chebyshev nodes.
template <class A>
struct Series;

template <>
struct Series<float> {
  static constexpr float kLowest = -86.9f, kHighest = 88.f;
  static constexpr float kLog2High = 0.69287109375f, kLog2Low = 0.00027608680994530943f;
  static constexpr float kExp[] = {0.5f, 0.16666576f, 0.041666552f, 0.008363293f, 0.0013926326f};
  static constexpr float kLog[] = {0.6666666865348816f, 0.3999970555305481f, 0.285923570394516f,
                                   0.2170657515525818f, 0.23224329948425293f};
};

template <>
struct Series<double> {
  static constexpr double kLowest = -707.9, kHighest = 709.;
  static constexpr double kLog2High = 0.6931471803691238, kLog2Low = 1.9082149292705877e-10;
  static constexpr double kExp[] = {
      0.5000000000000001,    0.16666666666666669,    0.04166666666662348,    0.008333333333330011,
      0.0013888888917538296, 0.00019841269863303223, 2.4801520792572694e-05, 2.75572680728901e-06,
      2.762032742826824e-07, 2.5100569275813683e-08};
  static constexpr double kLog[] = {0.6666666666666666,  0.39999999999999525, 0.285714285716001,
                                    0.2222222219823677,  0.18181819897962714, 0.1538454396486055,
                                    0.13335178631449257, 0.11734279061303197, 0.10845178394880015,
                                    0.07492143795550767, 0.1563057780092285};
};

template <class A, int kTerms>
DYNMM_INLINE Lanes<A> polynomial(const Lanes<A>& x, const A (&term)[kTerms]) {
  Lanes<A> sum = all(term[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) sum = sum * x + all(term[i]);
  return sum;
}

// e^x of x brought to kLowest..kHighest; nan of nan.
template <class A>
DYNMM_INLINE Lanes<A> exp_within(const Lanes<A>& any) {
  using S = Series<A>;
  using N = Number<A>;
  using BitsPart = typename Lanes<A>::BitsPart;
  // Adding 1.5 * 2^kMantissa rounds to whole numbers; n + kBias stands in the last bits then.
  constexpr A kRound = static_cast<A>((typename N::Bits{3} << (N::kMantissa - 1)) + N::kBias);
  const Lanes<A> x = larger(all(S::kLowest), smaller(all(S::kHighest), any));
  const Lanes<A> rounded = x * all(A(1.4426950408889634)) + all(kRound);
  const Lanes<A> n = rounded - all(kRound);
  const Lanes<A> r = (x - n * all(S::kLog2High)) - n * all(S::kLog2Low);
  Lanes<A> power;
  for (int p = 0; p < power.kParts; ++p) {
    power.part[p] = (typename Lanes<A>::Part)((BitsPart)rounded.part[p] << N::kMantissa);
  }
  return (((r * r) * polynomial(r, S::kExp) + r) + all(A{1})) * power;
}

// The same, but 0 below kLowest, where e^x is hardly a normal number.
template <class A>
DYNMM_INLINE Lanes<A> exp(const Lanes<A>& x) {
  return if_less(x, all(Series<A>::kLowest), all(A{0}), exp_within(x));
}

// log(1 + x) of 0 <= x <= 1.
template <class A>
DYNMM_INLINE Lanes<A> log_1_plus(const Lanes<A>& x) {
  const Lanes<A> z = x / (x + all(A{2}));
  const Lanes<A> w = z * z;
  return (z * w) * polynomial(w, Series<A>::kLog) + (z + z);
}

// log(x) of normal numbers x >= 1; nan of nan.
template <class A>
DYNMM_INLINE Lanes<A> log(const Lanes<A>& x) {
  using S = Series<A>;
  using N = Number<A>;
  using Part = typename Lanes<A>::Part;
  using BitsPart = typename Lanes<A>::BitsPart;
  constexpr auto kOne = typename N::Bits{N::kBias} << N::kMantissa;
  constexpr auto kFraction = (typename N::Bits{1} << N::kMantissa) - 1;
  // An exponent written into the last bits of 2^kMantissa, which is then taken off.
  constexpr A kWhole = static_cast<A>(typename N::Bits{1} << N::kMantissa);
  constexpr auto kWholeBits = typename N::Bits{N::kBias + N::kMantissa} << N::kMantissa;
  Lanes<A> fraction, exponent;
  for (int p = 0; p < x.kParts; ++p) {
    const BitsPart bits = (BitsPart)x.part[p];
    fraction.part[p] = (Part)((bits & kFraction) | kOne);
    exponent.part[p] = (Part)((bits >> N::kMantissa) | kWholeBits);
  }
  const Lanes<A> n = exponent - all(kWhole + A(N::kBias));
  const Lanes<A> rest = log_1_plus(fraction - all(A{1}));
  // x - x: nan where x is nothing to take a logarithm of
  return (n * all(S::kLog2High) + (n * all(S::kLog2Low) + rest)) + (x - x);
}

}  // namespace DYNMM_LEVEL
}  // namespace dynmm
