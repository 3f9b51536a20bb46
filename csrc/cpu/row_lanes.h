#pragma once

// A row of any floating type in lanes of the type of its sums, those left over at its end included.

#include "cpu/halves.h"
#include "dtypes.h"

namespace dynmm {
namespace DYNMM_LEVEL {

// Of as many elements as there are lanes the first `count`, zeros behind them.
#if DYNMM_VECTOR_BYTES == 64
DYNMM_INLINE uint32_t mask_of(int64_t count) { return (1u << count) - 1; }

template <class T>
DYNMM_INLINE void copy_to_many(const T* from, int64_t count, T* to) {
  const uint32_t mask = mask_of(count);
  if constexpr (sizeof(T) == 2) {
    _mm256_storeu_epi16(to, _mm256_maskz_loadu_epi16(mask, from));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_storeu_epi32(to, _mm512_maskz_loadu_epi32(mask, from));
  } else {
    _mm512_storeu_epi64(to, _mm512_maskz_loadu_epi64(mask, from));
  }
}

template <class T>
DYNMM_INLINE void copy_from_many(const T* from, int64_t count, T* to) {
  const uint32_t mask = mask_of(count);
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(to, mask, _mm256_loadu_epi16(from));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(to, mask, _mm512_loadu_epi32(from));
  } else {
    _mm512_mask_storeu_epi64(to, mask, _mm512_loadu_epi64(from));
  }
}
#else
template <class T>
DYNMM_INLINE void copy_from_many(const T* from, int64_t count, T* to) {
  if (count & 8) __builtin_memcpy(to, from, 8 * sizeof(T)), to += 8, from += 8;
  if (count & 4) __builtin_memcpy(to, from, 4 * sizeof(T)), to += 4, from += 4;
  if (count & 2) __builtin_memcpy(to, from, 2 * sizeof(T)), to += 2, from += 2;
  if (count & 1) __builtin_memcpy(to, from, sizeof(T));
}

template <class T>
DYNMM_INLINE void copy_to_many(const T* from, int64_t count, T* to) {
  __builtin_memset(to, 0, Lanes<Accumulator<T>>::kCount * sizeof(T));
  copy_from_many(from, count, to);
}
#endif

// Elements from `at` on: as many as there are lanes, or fewer.
struct Whole {
  int64_t at;

  template <class T>
  DYNMM_INLINED auto read(const T* from) const {
    return load(from + at);
  }
  template <class T, class A>
  DYNMM_INLINED void write(const Lanes<A>& value, T* to) const {
    store(value, to + at);
  }
};

struct Fewer {
  int64_t at, count;

  template <class T>
  DYNMM_INLINED auto read(const T* from) const {
    T some[Lanes<Accumulator<T>>::kCount];
    copy_to_many(from + at, count, some);
    return load(some);
  }
  template <class T, class A>
  DYNMM_INLINED void write(const Lanes<A>& value, T* to) const {
    T some[Lanes<A>::kCount];
    store(value, some);
    copy_from_many(some, count, to + at);
  }
};

template <class A, class F>
DYNMM_INLINE void once(int64_t size, const F& f) {
  constexpr int64_t kCount = Lanes<A>::kCount;
  int64_t at = 0;
  for (; at + kCount <= size; at += kCount) f(Whole{at});
  if (at < size) f(Fewer{at, size - at});
}

// As once, but the last elements may come with some before them that have come already.
template <class A, class F>
DYNMM_INLINE void at_least_once(int64_t size, const F& f) {
  constexpr int64_t kCount = Lanes<A>::kCount;
  if (size < kCount) return once<A>(size, f);
  int64_t at = 0;
  for (; at + kCount <= size; at += kCount) f(Whole{at});
  if (at < size) f(Whole{size - kCount});
}

}  // namespace DYNMM_LEVEL
}  // namespace dynmm
