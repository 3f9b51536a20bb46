#pragma once

#include "cuda/launch.h"
#include "maps.h"

namespace dynmm {

// Samples `stride` elements apart, as kernels see them.
template <class T>
struct Maps {
  T* base;
  int64_t stride;

  template <int kValues>
  __device__ Unit<T, kValues>& unit(int64_t n, int64_t element) const {
    return *reinterpret_cast<Unit<T, kValues>*>(base + n * stride + element);
  }
};

// The samples of a tensor, brought to `layout`.
struct Samples {
  Tensor kept;
  uint64_t bits;  // of the addresses at which samples begin

  Samples(const Tensor& t, const MapLayout& layout)
      : kept(layout.bring(t)), bits(address_bits(kept.const_data_ptr())) {
    if (kept.size(0) > 1) bits |= static_cast<uint64_t>(row_stride_bytes(kept));
  }

  template <class T>
  Maps<T> maps() const {
    return {static_cast<T*>(const_cast<void*>(kept.const_data_ptr())), kept.stride(0)};
  }
};

// Whether the channels of a pixel lie together. Those of a single pixel do in every layout.
inline bool channels_last(const MapLayout& layout) { return layout.last || layout.pixels == 1; }

// Calls f(values per access, channels last), both as types; `bits`: of all addresses. A wide access
// may cover two channels of many pixels each, but with channels last only channels of one pixel.
template <class T, class F>
void visit_access(const MapLayout& layout, uint64_t bits, const F& f) {
  const bool last = channels_last(layout);
  const auto bytes = (last ? layout.channels : layout.numel()) * static_cast<int64_t>(sizeof(T));
  const auto visit = [&](auto values) {
    if (last) {
      f(values, std::true_type{});
    } else {
      f(values, std::false_type{});
    }
  };
  if (access_width(bits | static_cast<uint64_t>(bytes)) == 16) {
    visit(std::integral_constant<int, kWideValues<T>>{});
  } else {
    visit(std::integral_constant<int, 1>{});
  }
}

}  // namespace dynmm
