#pragma once

// Arithmetic on 64 bytes at a time, for the instruction set of the file that includes this. Every
// set computes the same operations in the same order, and so the same bits.
//
// Nothing here may call what other files share, such as a template of the standard library: the
// linker could keep the copy that was compiled for AVX-512, for every processor.

#include <cstdint>

// All that returns vectors must be inlined: GCC 12 clears their upper lanes on the way out.
#define DYNMM_INLINED __attribute__((always_inline))
#define DYNMM_INLINE static inline DYNMM_INLINED
#define DYNMM_APART __attribute__((noinline))  // loops, of which one copy is enough

namespace dynmm {
namespace DYNMM_LEVEL {

template <class A>
struct Number;

template <>
struct Number<float> {
  using Bits = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kInfinity = __builtin_inff();
};

template <>
struct Number<double> {
  using Bits = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kInfinity = __builtin_inf();
};

template <class A>
struct Lanes {
  using Bits = typename Number<A>::Bits;
  typedef A Part __attribute__((vector_size(DYNMM_VECTOR_BYTES)));
  typedef Bits BitsPart __attribute__((vector_size(DYNMM_VECTOR_BYTES)));
  static constexpr int kParts = 64 / DYNMM_VECTOR_BYTES;
  static constexpr int kCount = 64 / sizeof(A);

  Part part[kParts];
};

// Part by part: GCC 12 would copy the whole by pieces of 16 bytes, which no wider load may follow
// at once.
template <class A>
DYNMM_INLINE Lanes<A> load(const A* from) {
  Lanes<A> to;
  for (int p = 0; p < to.kParts; ++p) {
    __builtin_memcpy(&to.part[p], from + p * (to.kCount / to.kParts), sizeof(to.part[p]));
  }
  return to;
}

template <class A>
DYNMM_INLINE void store(const Lanes<A>& from, A* to) {
  for (int p = 0; p < from.kParts; ++p) {
    __builtin_memcpy(to + p * (from.kCount / from.kParts), &from.part[p], sizeof(from.part[p]));
  }
}

template <class A>
DYNMM_INLINE Lanes<A> all(A value) {
  Lanes<A> to;
  for (int p = 0; p < to.kParts; ++p) to.part[p] = value - typename Lanes<A>::Part{};
  return to;
}

template <class A>
DYNMM_INLINE A lane_of(const Lanes<A>& from, int lane) {
  A value;
  __builtin_memcpy(&value, reinterpret_cast<const char*>(&from) + lane * sizeof(A), sizeof(A));
  return value;
}

template <class A>
DYNMM_INLINE void set_lane(A value, int lane, Lanes<A>& to) {
  __builtin_memcpy(reinterpret_cast<char*>(&to) + lane * sizeof(A), &value, sizeof(A));
}

#define DYNMM_BINARY(op)                                                   \
  template <class A>                                                       \
  DYNMM_INLINE Lanes<A> operator op(Lanes<A> a, const Lanes<A>& b) {       \
    for (int p = 0; p < a.kParts; ++p) a.part[p] = a.part[p] op b.part[p]; \
    return a;                                                              \
  }
DYNMM_BINARY(+)
DYNMM_BINARY(-)
DYNMM_BINARY(*)
DYNMM_BINARY(/)
#undef DYNMM_BINARY

// a < b ? x : y, lane by lane.
template <class A>
DYNMM_INLINE Lanes<A> if_less(const Lanes<A>& a, const Lanes<A>& b, const Lanes<A>& x, Lanes<A> y) {
  for (int p = 0; p < a.kParts; ++p) y.part[p] = a.part[p] < b.part[p] ? x.part[p] : y.part[p];
  return y;
}

template <class A>
DYNMM_INLINE Lanes<A> if_equal(const Lanes<A>& a, const Lanes<A>& b, const Lanes<A>& x,
                               Lanes<A> y) {
  for (int p = 0; p < a.kParts; ++p) y.part[p] = a.part[p] == b.part[p] ? x.part[p] : y.part[p];
  return y;
}

// The larger or smaller one; b where they do not compare. The compiler would not find the
// instruction that does just this.
#if DYNMM_VECTOR_BYTES == 64
#define DYNMM_BEST(which, type) _mm512_##which##_##type
#elif DYNMM_VECTOR_BYTES == 32
#define DYNMM_BEST(which, type) _mm256_##which##_##type
#elif defined(__SSE2__)
#define DYNMM_BEST(which, type) _mm_##which##_##type
#endif

#ifdef DYNMM_BEST
#define DYNMM_EXTREME(name, A, instruction)                                           \
  DYNMM_INLINE Lanes<A> name(Lanes<A> a, const Lanes<A>& b) {                         \
    for (int p = 0; p < a.kParts; ++p) a.part[p] = instruction(a.part[p], b.part[p]); \
    return a;                                                                         \
  }
DYNMM_EXTREME(larger, float, DYNMM_BEST(max, ps))
DYNMM_EXTREME(larger, double, DYNMM_BEST(max, pd))
DYNMM_EXTREME(smaller, float, DYNMM_BEST(min, ps))
DYNMM_EXTREME(smaller, double, DYNMM_BEST(min, pd))
#undef DYNMM_EXTREME
#else
template <class A>
DYNMM_INLINE Lanes<A> larger(const Lanes<A>& a, const Lanes<A>& b) {
  return if_less(b, a, a, b);
}
template <class A>
DYNMM_INLINE Lanes<A> smaller(const Lanes<A>& a, const Lanes<A>& b) {
  return if_less(a, b, a, b);
}
#endif

template <class A>
DYNMM_INLINE Lanes<A> finite_or_zero(const Lanes<A>& a) {
  const Lanes<A> zero = all(A{0});
  return if_equal(a - a, zero, a, zero);
}

// 0, 1, 2, ...
template <class A>
DYNMM_INLINE Lanes<A> numbered() {
  A to[Lanes<A>::kCount];
  for (int l = 0; l < Lanes<A>::kCount; ++l) to[l] = static_cast<A>(l);
  return load(to);
}

// The lanes of which the numbers differ by `step`, a power of two, change places.
template <class A>
DYNMM_INLINE Lanes<A> swapped(const Lanes<A>& a, int step) {
  using L = Lanes<A>;
  constexpr int kWidth = L::kCount / L::kParts;
  L to;
  if (step >= kWidth) {
    for (int p = 0; p < L::kParts; ++p) to.part[p] = a.part[p ^ (step / kWidth)];
    return to;
  }
#ifdef __clang__
  A lane[L::kCount], other[L::kCount];
  store(a, lane);
  for (int l = 0; l < L::kCount; ++l) other[l] = lane[l ^ step];
  return load(other);
#else
  static constexpr
      typename L::Bits kOrder[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  typename L::BitsPart order;
  __builtin_memcpy(&order, kOrder, sizeof(order));
  order ^= static_cast<typename L::Bits>(step);
  for (int p = 0; p < L::kParts; ++p) to.part[p] = __builtin_shuffle(a.part[p], order);
  return to;
#endif
}

// In every lane the sum of all, in pairs.
template <class A>
DYNMM_INLINE Lanes<A> sum_of(Lanes<A> a) {
#pragma GCC unroll 4
  for (int step = Lanes<A>::kCount / 2; step > 0; step /= 2) a = a + swapped(a, step);
  return a;
}

template <class A>
DYNMM_INLINE Lanes<A> largest_of(Lanes<A> a) {
#pragma GCC unroll 4
  for (int step = Lanes<A>::kCount / 2; step > 0; step /= 2) a = larger(swapped(a, step), a);
  return a;
}

}  // namespace DYNMM_LEVEL
}  // namespace dynmm
