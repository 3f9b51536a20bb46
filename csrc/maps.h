#pragma once

#include "common.h"

namespace dynmm {

// How feature maps [N, C, ...] of one call lie in memory: channel by channel, or, where the first
// of them does, channels last. Maps in any other layout are copied.
class MapLayout {
 public:
  int64_t channels, pixels;
  bool last;

  explicit MapLayout(const Tensor& t) {
    const auto sizes = t.sizes();
    const size_t dims = sizes.size();
    channels = sizes[1];
    pixels = 1;
    for (size_t d = 2; d < dims; ++d) pixels *= sizes[d];
    const Strides channels_first = fresh_strides(t, false), channels_last = fresh_strides(t, true);
    const bool rank = dims == 4 || dims == 5;
    last = rank && !agree(t, channels_first) && agree(t, channels_last);
    strides_ = last ? channels_last : channels_first;
  }

  int64_t numel() const { return channels * pixels; }

  // Uninitialised maps of `rows` samples.
  Tensor empty(const Tensor& like, int64_t rows) const {
    const auto sizes = like.sizes();
    Strides shape(sizes.data(), sizes.data() + sizes.size());
    shape[0] = rows;
    return empty_strided(like, static_cast<int64_t>(shape.size()), shape.data(), strides_.data(),
                         like.scalar_type());
  }

  // Uninitialised [rows, C] of the type that sums and factors of `like` have.
  Tensor empty_sums(const Tensor& like, int64_t rows) const {
    const bool wide = accumulates_in_double(like.scalar_type());
    return empty_matrix(like, rows, channels, wide ? ScalarType::Double : ScalarType::Float);
  }

  // `t`, or a copy, whose samples lie in this layout, at any distance from each other.
  Tensor bring(const Tensor& t) const {
    if (agree(t, strides_)) return t;
    Tensor copy = empty(t, t.size(0));
    return torch::stable::copy_(copy, t);
  }

 private:
  static Strides fresh_strides(const Tensor& t, bool last) {
    const auto sizes = t.sizes();
    Strides strides(sizes.size(), 1);
    int64_t step = last ? std::max<int64_t>(sizes[1], 1) : 1;
    for (size_t d = sizes.size(); d-- > 2;) {
      strides[d] = step;
      step *= std::max<int64_t>(sizes[d], 1);
    }
    strides[1] = last ? 1 : step;
    strides[0] = last ? step : step * std::max<int64_t>(sizes[1], 1);
    return strides;
  }

  // Whether within a sample the elements lie as `strides` say.
  static bool agree(const Tensor& t, const Strides& strides) {
    const auto sizes = t.sizes();
    const auto old = t.strides();
    for (size_t d = 1; d < sizes.size(); ++d) {
      if (sizes[d] > 1 && old[d] != strides[d]) return false;
    }
    return true;
  }

  Strides strides_;
};

// What multiplies maps of T or is added to them, [N, C].
template <class T>
const Accumulator<T>* factors(const Tensor& contiguous) {
  return static_cast<const Accumulator<T>*>(contiguous.const_data_ptr());
}

}  // namespace dynmm
