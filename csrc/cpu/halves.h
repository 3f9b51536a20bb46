#pragma once

// Rows of any floating type to and from the type of their sums, by integers where the instruction
// set has nothing better: the same bits, but for what is carried in a nan.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/simd.h"

namespace dynmm {
namespace DYNMM_LEVEL {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

DYNMM_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

DYNMM_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

DYNMM_INLINE float widened(BFloat16 value) { return float_of(uint32_t{value.x} << 16); }

DYNMM_INLINE float widened(Half value) {
  const uint32_t magnitude = value.x & 0x7fffu, sign = (value.x & 0x8000u) << 16;
  const uint32_t rebased = (magnitude << 13) + (112u << 23);
  const uint32_t endless = rebased + (112u << 23);
  const uint32_t quiet = magnitude > 0x7c00u ? 1u << 22 : 0u;
  // Below the normal numbers: the last bits of one half, which is then taken off.
  const uint32_t small = bits_of(float_of((126u << 23) | magnitude) - 0.5f);
  const uint32_t normal = magnitude < 0x7c00u ? rebased : endless | quiet;
  return float_of(sign | (magnitude < 0x400u ? small : normal));
}

DYNMM_INLINE void narrow(float value, BFloat16* to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->x = static_cast<uint16_t>((bits & 0x7fffffffu) > (255u << 23) ? 0x7fc0u : rounded);
}

DYNMM_INLINE void narrow(float value, Half* to) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - (126u << 23);
  const uint32_t finite = magnitude < (113u << 23) ? small : rounded;
  const uint32_t endless =
      magnitude > (255u << 23) ? 0x7e00u | (magnitude >> 13 & 0x3ffu) : 0x7c00u;
  const uint32_t any = magnitude < (143u << 23) ? finite : endless;
  to->x = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | any);
}

template <class T>
DYNMM_INLINE void widen(const T* __restrict__ from, int64_t size, float* __restrict__ to) {
  for (int64_t i = 0; i < size; ++i) to[i] = widened(from[i]);
}

template <class T>
DYNMM_INLINE void narrow(const float* __restrict__ from, int64_t size, T* __restrict__ to) {
  for (int64_t i = 0; i < size; ++i) narrow(from[i], to + i);
}

#if DYNMM_VECTOR_BYTES > 16
DYNMM_INLINE void widen(const Half* __restrict__ from, int64_t size, float* __restrict__ to) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  }
  for (; i < size; ++i) to[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(from[i].x)));
}

DYNMM_INLINE void narrow(const float* __restrict__ from, int64_t size, Half* __restrict__ to) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
  for (; i < size; ++i) {
    to[i].x = static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(from[i]), 0)));
  }
}
#endif

DYNMM_INLINE void widen(const float* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = from[i];
}
DYNMM_INLINE void narrow(const float* from, int64_t size, float* to) { widen(from, size, to); }

DYNMM_INLINE void widen(const double* from, int64_t size, double* to) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) store(load(from + i), to + i);
  for (; i < size; ++i) to[i] = from[i];
}
DYNMM_INLINE void narrow(const double* from, int64_t size, double* to) { widen(from, size, to); }

typedef uint16_t ShortPart __attribute__((vector_size(DYNMM_VECTOR_BYTES / 2)));
typedef uint32_t WordPart __attribute__((vector_size(DYNMM_VECTOR_BYTES)));

DYNMM_INLINE Lanes<float> load(const BFloat16* from) {
  Lanes<float> to;
  for (int p = 0; p < to.kParts; ++p) {
    ShortPart half;
    __builtin_memcpy(&half, from + p * (to.kCount / to.kParts), sizeof(half));
    to.part[p] = (Lanes<float>::Part)(__builtin_convertvector(half, WordPart) << 16);
  }
  return to;
}

DYNMM_INLINE void store(const Lanes<float>& from, BFloat16* to) {
  for (int p = 0; p < from.kParts; ++p) {
    const WordPart bits = (WordPart)from.part[p];
    const WordPart rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const WordPart any = from.part[p] == from.part[p] ? rounded : WordPart{} + 0x7fc0u;
    const ShortPart half = __builtin_convertvector(any, ShortPart);
    __builtin_memcpy(to + p * (from.kCount / from.kParts), &half, sizeof(half));
  }
}

#if DYNMM_VECTOR_BYTES == 64
// With a mask of all: without one GCC 12 warns of a value that its own header leaves undefined.
DYNMM_INLINE Lanes<float> load(const Half* from) {
  return {{_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from))}};
}
DYNMM_INLINE void store(const Lanes<float>& from, Half* to) {
  _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(0xffff, from.part[0], 0));
}
#elif DYNMM_VECTOR_BYTES == 32
DYNMM_INLINE Lanes<float> load(const Half* from) {
  const auto* parts = (const __m128i*)from;
  return {{_mm256_cvtph_ps(_mm_loadu_si128(parts)), _mm256_cvtph_ps(_mm_loadu_si128(parts + 1))}};
}
DYNMM_INLINE void store(const Lanes<float>& from, Half* to) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(from.part[0], 0));
  _mm_storeu_si128((__m128i*)to + 1, _mm256_cvtps_ph(from.part[1], 0));
}
#else
DYNMM_INLINE Lanes<float> load(const Half* from) {
  float wide[Lanes<float>::kCount];
  widen(from, Lanes<float>::kCount, wide);
  return load(wide);
}
DYNMM_INLINE void store(const Lanes<float>& from, Half* to) {
  float wide[Lanes<float>::kCount];
  store(from, wide);
  narrow(wide, Lanes<float>::kCount, to);
}
#endif

constexpr int64_t kAhead = 2048;  // bytes: rows that come next are asked for in time

// Whole vectors, the last of them filled up with `pad`. What is stored is what is loaded again: a
// processor passes no store on to a load that straddles it.
template <class T, class A>
DYNMM_INLINE void fill(const T* from, int64_t size, A pad, A* to) {
  constexpr int kLanes = Lanes<A>::kCount;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    __builtin_prefetch(from + i + kAhead / sizeof(T));
    widen(from + i, kLanes, to + i);
  }
  if (i == size) return;
  A last[kLanes];
  store(all(pad), last);
  widen(from + i, size - i, last);
  store(load(last), to + i);
}

DYNMM_INLINE void fill(const float* from, int64_t size, float pad, float* to) {
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    __builtin_prefetch(from + i + kAhead / sizeof(float));
    store(load(from + i), to + i);
  }
  if (i == size) return;
#if DYNMM_VECTOR_BYTES == 64
  const auto rest = static_cast<__mmask16>((1u << (size - i)) - 1);
  _mm512_storeu_ps(to + i, _mm512_mask_loadu_ps(_mm512_set1_ps(pad), rest, from + i));
#else
  float last[16];
  store(all(pad), last);
  for (int64_t l = 0; i + l < size; ++l) last[l] = from[i + l];
  store(load(last), to + i);
#endif
}

}  // namespace DYNMM_LEVEL
}  // namespace dynmm
