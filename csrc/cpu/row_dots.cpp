// row_dots on the CPU.
#include "ops/row_dots.h"

#include "cpu/slots.h"

namespace dynmm {
namespace {

// Eight fixed lanes in double: the compiler can vectorise, and the order never changes.
template <class T>
double dot(const T* a, const T* b, int64_t numel) {
  using A = Accumulator<T>;
  constexpr int64_t kLanes = 8;
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      lane[l] += static_cast<double>(static_cast<A>(a[i + l])) *
                 static_cast<double>(static_cast<A>(b[i + l]));
    }
  }
  for (int64_t l = 0; i < numel; ++i, ++l) {
    lane[l] +=
        static_cast<double>(static_cast<A>(a[i])) * static_cast<double>(static_cast<A>(b[i]));
  }
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

struct Dots : OnCpu {
  using OnCpu::OnCpu;

  template <class T, class A = Accumulator<T>>
  void dots(const Slots& slots, const Blocks& rows, const int32_t* inverse, int64_t num_rows,
            int64_t ranks, int64_t numel, const Tensor& dots) const {
    auto* out = static_cast<A*>(dots.mutable_data_ptr());
    const int64_t bytes = numel * static_cast<int64_t>(sizeof(T));
    parallel_rows(num_rows, bytes * ranks, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const auto* row = reinterpret_cast<const T*>(rows.base + n * rows.stride);
        for (int64_t e = n * ranks; e < (n + 1) * ranks; ++e) {
          const auto* other = reinterpret_cast<const T*>(row_of(slots, inverse[e]));
          out[e] = other == nullptr ? A{0} : static_cast<A>(dot(row, other, numel));
        }
      }
    });
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CPU, m) {
  m.impl("row_dots", TORCH_BOX(&dynmm::row_dots<dynmm::Dots>));
  m.impl("row_dots.traced", TORCH_BOX(&dynmm::row_dots<dynmm::Dots>));
}
