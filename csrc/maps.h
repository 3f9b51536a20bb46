#pragma once

#include <algorithm>

#include "rows.h"

namespace dynmm {

// How feature maps [N, C, ...] of one call lie in memory: channel by channel, or, where the first
// of them does, channels last. Maps in any other layout are copied.
class MapLayout {
 public:
  int64_t channels, pixels = 1;
  bool last;

  explicit MapLayout(const Operand& t) : channels(t.sizes[1]) {
    for (size_t d = 2; d < t.dims(); ++d) pixels *= t.sizes[d];
    const std::vector<int64_t> first = fresh_strides(t, false), behind = fresh_strides(t, true);
    last = (t.dims() == 4 || t.dims() == 5) && !agree(t, first) && agree(t, behind);
    strides_ = last ? behind : first;
  }

  int64_t numel() const { return channels * pixels; }

  // Uninitialised maps of `rows` samples.
  Tensor empty(const Operand& like, int64_t rows) const {
    return empty_rows(like, rows, strides_.data());
  }

  // Uninitialised [rows, C] of the type that sums and factors of `like` have.
  Tensor empty_sums(const Operand& like, int64_t rows) const {
    return empty_matrix(like.device, rows, channels, weight_dtype(like.dtype));
  }

  // `t`, or a copy, whose samples lie in this layout, at any distance from each other.
  Tensor bring(const Operand& t) const {
    if (agree(t, strides_) && is_aligned(t.tensor.const_data_ptr(), t.dtype)) return t.tensor;
    Tensor copy = empty(t, t.rows());
    return torch::stable::copy_(copy, t.tensor);
  }

 private:
  static std::vector<int64_t> fresh_strides(const Operand& t, bool last) {
    std::vector<int64_t> strides(t.dims(), 1);
    int64_t step = last ? std::max<int64_t>(t.sizes[1], 1) : 1;
    for (size_t d = t.dims(); d-- > 2;) {
      strides[d] = step;
      step *= std::max<int64_t>(t.sizes[d], 1);
    }
    strides[1] = last ? 1 : step;
    strides[0] = last ? step : step * std::max<int64_t>(t.sizes[1], 1);
    return strides;
  }

  // Whether within a sample the elements lie as `strides` say.
  static bool agree(const Operand& t, const std::vector<int64_t>& strides) {
    for (size_t d = 1; d < t.dims(); ++d) {
      if (t.sizes[d] > 1 && t.strides[d] != strides[d]) return false;
    }
    return true;
  }

  std::vector<int64_t> strides_;
};

// The samples of a tensor, brought to a layout.
struct Samples {
  Tensor kept;
  int64_t stride;
  uint64_t bits;  // of the addresses at which samples begin

  Samples(const Operand& t, const MapLayout& layout)
      : Samples(layout.bring(t), t.rows(), t.element_size()) {}

  Samples(const Tensor& maps, int64_t rows, int64_t element_size)
      : kept(maps), stride(maps.stride(0)), bits(address_bits(maps.const_data_ptr())) {
    if (rows > 1) bits |= static_cast<uint64_t>(stride * element_size);
  }

  template <class T>
  Maps<T> maps() const {
    return {static_cast<T*>(const_cast<void*>(kept.const_data_ptr())), stride};
  }
};

}  // namespace dynmm
