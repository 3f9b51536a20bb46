#pragma once

// Classes of some rows as vectors, one after the other: the form in which energy_fuse computes.

#include "cpu/halves.h"
#include "energies.h"

namespace dynmm {
namespace DYNMM_LEVEL {

constexpr int kVectors = 64;  // of a strip
constexpr int kFew = 32;      // classes, up to which lanes are rows

template <class A>
struct alignas(64) Strip {
  A value[kVectors * Lanes<A>::kCount];

  DYNMM_INLINED Lanes<A> operator[](int64_t k) const { return load(value + k * Lanes<A>::kCount); }
  DYNMM_INLINED void set(int64_t k, const Lanes<A>& to) { store(to, value + k * Lanes<A>::kCount); }
};

// Four rows of four numbers, lines of which lie at a distance, change places with columns.
DYNMM_INLINE void turn_four(const float* const from[4], float* const to[4]) {
#ifdef __SSE2__
  __m128 a = _mm_loadu_ps(from[0]), b = _mm_loadu_ps(from[1]);
  __m128 c = _mm_loadu_ps(from[2]), d = _mm_loadu_ps(from[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to[0], a);
  _mm_storeu_ps(to[1], b);
  _mm_storeu_ps(to[2], c);
  _mm_storeu_ps(to[3], d);
#else
  float kept[4][4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(kept[i], from[i], sizeof(kept[i]));
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) to[i][j] = kept[j][i];
  }
#endif
}

// rows[lane][c] to strip[c][lane], and back.
template <class A>
DYNMM_INLINE void turn(const A* const rows[], int64_t classes, Strip<A>& strip) {
  constexpr int kLanes = Lanes<A>::kCount;
  for (int l = 0; l < kLanes; ++l) {
    for (int64_t c = 0; c < classes; ++c) strip.value[c * kLanes + l] = rows[l][c];
  }
}

template <class A>
DYNMM_INLINE void turn_back(const Strip<A>& strip, int64_t classes, A* const rows[]) {
  constexpr int kLanes = Lanes<A>::kCount;
  for (int l = 0; l < kLanes; ++l) {
    for (int64_t c = 0; c < classes; ++c) rows[l][c] = strip.value[c * kLanes + l];
  }
}

DYNMM_INLINE void turn(const float* const rows[], int64_t classes, Strip<float>& strip) {
  if (classes < 4) return turn<float>(rows, classes, strip);
  for (int64_t at = 0; at < classes; at += 4) {
    const int64_t c = at + 4 <= classes ? at : classes - 4;  // the last four, some of them again
    float* const to = strip.value + c * 16;
    for (int l = 0; l < 16; l += 4) {
      const float* const from[] = {rows[l] + c, rows[l + 1] + c, rows[l + 2] + c, rows[l + 3] + c};
      float* const lines[] = {to + l, to + l + 16, to + l + 32, to + l + 48};
      turn_four(from, lines);
    }
  }
}

DYNMM_INLINE void turn_back(const Strip<float>& strip, int64_t classes, float* const rows[]) {
  if (classes < 4) return turn_back<float>(strip, classes, rows);
  for (int64_t at = 0; at < classes; at += 4) {
    const int64_t c = at + 4 <= classes ? at : classes - 4;
    const float* const from = strip.value + c * 16;
    for (int l = 0; l < 16; l += 4) {
      const float* const lines[] = {from + l, from + l + 16, from + l + 32, from + l + 48};
      float* const to[] = {rows[l] + c, rows[l + 1] + c, rows[l + 2] + c, rows[l + 3] + c};
      turn_four(lines, to);
    }
  }
}

// Some rows, one per lane of what belongs to a row, and those of their logits that are at hand.
// Where classes are few, one piece holds all rows, in the same lanes. Else each row is a piece, of
// which lanes hold consecutive classes.
template <class A>
struct Unit {
  static constexpr int kLanes = Lanes<A>::kCount;

  int64_t row, classes;
  int count;  // of rows
  bool turned;
  int piece;
  int64_t at, size;  // the classes at hand

  Unit(int64_t row, int64_t rows, int64_t classes)
      : row(row), classes(classes), turned(classes <= kFew), piece(0) {
    count = static_cast<int>(rows < kLanes ? rows : kLanes);
    move_to(0, 0);
  }

  int pieces() const { return turned ? 1 : count; }
  int64_t span() const { return turned ? classes : kVectors * kLanes; }
  bool whole() const { return classes <= span(); }
  void move_to(int to, int64_t first) {
    piece = to;
    at = first;
    size = classes - at < span() ? classes - at : span();
  }
  int64_t vectors() const { return turned ? size : (size + kLanes - 1) / kLanes; }
  // Lanes of the last vector that hold anything.
  A filled() const { return static_cast<A>(turned ? kLanes : size - (vectors() - 1) * kLanes); }

  // Each row's number at [row, column] of a table, in its lane.
  template <class V>
  DYNMM_INLINED Lanes<A> column(const V* table, int64_t columns, int64_t column) const {
    A lane[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      lane[l] = l < count ? static_cast<A>(table[(row + l) * columns + column]) : A{0};
    }
    return load(lane);
  }

  DYNMM_INLINED void set_column(const Lanes<A>& to, A* table, int64_t columns,
                                int64_t column) const {
    A lane[kLanes];
    store(to, lane);
    for (int l = 0; l < count; ++l) table[(row + l) * columns + column] = lane[l];
  }

  // What belongs to the rows of this piece, for each of its lanes.
  DYNMM_INLINED Lanes<A> spread(const Lanes<A>& of_rows) const {
    return turned ? of_rows : all(lane_of(of_rows, piece));
  }

  // `pad` where lanes hold nothing; zeros where `here` says that a row is not there.
  template <class V>
  DYNMM_APART void read(const Maps<const V>& table, const Lanes<A>& here, bool everywhere, A pad,
                        Strip<A>& strip) const {
    if (!turned) {
      if (everywhere || lane_of(here, piece) != A{0}) {
        fill(table.base + (row + piece) * table.stride + at, size, pad, strip.value);
      } else {
        for (int64_t k = 0; k < vectors(); ++k) strip.set(k, all(A{0}));
      }
      return;
    }
    const V* from[kLanes];
    for (int l = 0; l < kLanes; ++l) from[l] = table.base + (row + l) * table.stride;
    if (count < kLanes || !everywhere) {
      static constexpr V kNothing[kFew] = {};
      for (int l = 0; l < kLanes; ++l) {
        if (l >= count || lane_of(here, l) == A{0}) from[l] = kNothing;
      }
    }
    widen_and_turn(from, strip);
  }

  template <class V>
  DYNMM_APART void write(const Strip<A>& strip, V* table) const {
    if (!turned) return narrow(strip.value, size, table + (row + piece) * classes + at);
    V nowhere[kFew];
    V* to[kLanes];
    for (int l = 0; l < kLanes; ++l) to[l] = l < count ? table + (row + l) * classes : nowhere;
    turn_and_narrow(strip, to);
  }

 private:
  void widen_and_turn(const A* const from[], Strip<A>& strip) const { turn(from, size, strip); }
  void turn_and_narrow(const Strip<A>& strip, A* const to[]) const { turn_back(strip, size, to); }

  template <class V>
  void widen_and_turn(const V* const from[], Strip<A>& strip) const {
    A wide[kLanes][kFew];
    const A* rows[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      widen(from[l], size, wide[l]);
      rows[l] = wide[l];
    }
    turn(rows, size, strip);
  }

  template <class V>
  void turn_and_narrow(const Strip<A>& strip, V* const to[]) const {
    A wide[kLanes][kFew];
    A* rows[kLanes];
    for (int l = 0; l < kLanes; ++l) rows[l] = wide[l];
    turn_back(strip, size, rows);
    for (int l = 0; l < kLanes; ++l) narrow(wide[l], size, to[l]);
  }
};

}  // namespace DYNMM_LEVEL
}  // namespace dynmm
