#pragma once

#include "cuda/launch.h"
#include "maps.h"

namespace dynmm {

// kValues values of sample n from `element` on.
template <int kValues, class T>
__device__ Unit<T, kValues>& unit_of(const Maps<T>& maps, int64_t n, int64_t element) {
  return *reinterpret_cast<Unit<T, kValues>*>(maps.sample(n) + element);
}

// Sample n in units of kValues values.
template <int kValues, class T>
__device__ const Unit<T, kValues>* units_of(const Maps<T>& maps, int64_t n) {
  return reinterpret_cast<const Unit<T, kValues>*>(maps.sample(n));
}

// Whether the channels of a pixel lie together. Those of a single pixel do in every layout.
inline bool channels_last(const MapLayout& layout) { return layout.last || layout.pixels == 1; }

// Calls f(values per access, channels last), both as types; `bits`: of all addresses. A wide access
// may cover two channels of many pixels each, but with channels last only channels of one pixel.
template <class T, class F>
void visit_access(const MapLayout& layout, uint64_t bits, const F& f) {
  const bool last = channels_last(layout);
  const auto bytes = (last ? layout.channels : layout.numel()) * static_cast<int64_t>(sizeof(T));
  visit_values<T>(bits | static_cast<uint64_t>(bytes), [&](auto values) {
    if (last) {
      f(values, std::true_type{});
    } else {
      f(values, std::false_type{});
    }
  });
}

}  // namespace dynmm
