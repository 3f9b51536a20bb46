#pragma once

#include <algorithm>

#include "host_device.h"
#include "tensors.h"

namespace dynmm {

// How a sample's row lies in memory: in one block, so that moving the block moves the row. Rows
// whose elements fill a block, whatever their order (contiguous, channels_last, transposed), keep
// it; others become contiguous.
struct RowLayout {
  int64_t numel = 1;
  int64_t bytes = 0;
  std::vector<int64_t> strides;  // of fresh rows in this layout, dim 0 included

  explicit RowLayout(const Operand& t) {
    const size_t dims = t.dims();
    for (size_t d = 1; d < dims; ++d) numel *= t.sizes[d];
    bytes = numel * t.element_size();
    const bool kept = numel > 0 && fills_a_block(t);
    strides.assign(dims, 1);
    int64_t step = 1;
    for (size_t d = dims; d-- > 1;) {
      strides[d] = kept ? t.strides[d] : step;
      step *= t.sizes[d] > 1 ? t.sizes[d] : 1;
    }
    strides[0] = numel > 0 ? numel : step;
  }

  // Whether the rows of `t`, of the same shape, lie so, at any distance from each other.
  bool holds(const Operand& t) const {
    for (size_t d = 1; d < t.dims(); ++d) {
      if (t.sizes[d] > 1 && t.strides[d] != strides[d]) return numel == 0;
    }
    return true;
  }

 private:
  bool fills_a_block(const Operand& t) const {
    if (numel <= 1) return true;
    // Walk from the fastest dimension up: each must start where the last one ended.
    int64_t filled = 1;
    for (size_t step = 1; step < t.dims(); ++step) {
      if (filled == numel) return true;
      bool found = false;
      for (size_t d = t.dims(); d-- > 1 && !found;) {
        if (t.sizes[d] > 1 && t.strides[d] == filled) {
          filled *= t.sizes[d];
          found = true;
        }
      }
      if (!found) return false;
    }
    return filled == numel;
  }
};

// Rows in one block each, `stride` bytes apart.
struct Blocks {
  const char* base;
  int64_t stride;
};

inline Blocks blocks_at(const Operand& t) {
  return {data_of<char>(t.tensor), t.strides[0] * t.element_size()};
}

// A row that lies in runs of equal size, `stride` bytes apart, as slices of wider rows do.
struct Runs {
  int64_t count = 1, stride = 0;
};

// std::nullopt: the rows of `t` come in one block to `layout`, or do not lie so either.
inline std::optional<Runs> runs_of(const Operand& t, const RowLayout& layout) {
  if (layout.holds(t)) return std::nullopt;
  int64_t run = 1, count = 1, stride = 0;
  for (size_t d = t.dims(); d-- > 1;) {
    const int64_t size = t.sizes[d], step = t.strides[d];
    if (size == 1) continue;
    if (count == 1 && step == run) {
      run *= size;
    } else if (count == 1 || step == stride * count) {
      if (count == 1) stride = step;
      count *= size;
    } else {
      return std::nullopt;
    }
  }
  return Runs{count, stride * t.element_size()};
}

// Brings tensors to layouts. Those that lie otherwise are copied, each once however often it comes,
// and the copies live as long as this. Where values are read, not moved, they are aligned as well.
class Copies {
 public:
  explicit Copies(bool aligned) : aligned_(aligned) {}

  Blocks blocks_of(const Operand& t, const RowLayout& layout) {
    const auto* data = data_of<char>(t.tensor);
    if (layout.holds(t) && (!aligned_ || is_aligned(data, t.dtype))) return blocks_at(t);
    const int64_t stride = layout.strides[0] * t.element_size();
    for (const Copy& copy : copies_) {
      if (copy.from == data && equal(copy.of, t)) return {data_of<char>(copy.kept), stride};
    }
    Tensor kept = empty_rows(t, t.rows(), layout.strides.data());
    torch::stable::copy_(kept, t.tensor);
    copies_.push_back({t, data, kept});
    return {data_of<char>(kept), stride};
  }

 private:
  struct Copy {
    Operand of;
    const char* from;
    Tensor kept;
  };

  static bool equal(const Operand& a, const Operand& b) {
    const auto same = [](const Sizes& x, const Sizes& y) {
      return std::equal(x.begin(), x.end(), y.begin(), y.end());
    };
    return a.dtype == b.dtype && same(a.sizes, b.sizes) && same(a.strides, b.strides);
  }

  bool aligned_;
  std::vector<Copy> copies_;
};

inline uint64_t address_bits(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

}  // namespace dynmm
