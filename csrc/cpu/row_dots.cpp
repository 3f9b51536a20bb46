// row_dots: dots[n, j] = <rows[n], row(inverse[n, j])>, zero where there is no row.
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

}  // namespace

Tensor row_dots(const Tensor& rows, std::vector<Tensor> outputs, std::vector<int64_t> starts,
                const Tensor& inverse) {
  const Tensor index = as_contiguous(inverse);
  const auto* slot = static_cast<const int32_t*>(index.const_data_ptr());
  const int64_t num_rows = inverse.size(0), ranks = inverse.size(1);
  const ScalarType dtype = rows.scalar_type();
  const RowLayout layout(rows);
  const Tensor blocks = as_blocks(rows, layout);
  const int64_t stride = row_stride_bytes(blocks);
  const auto* base = static_cast<const char*>(blocks.const_data_ptr());
  const Slots slots(outputs, starts, layout);
  const bool wide = accumulates_in_double(dtype);
  const Tensor dots =
      empty_matrix(rows, num_rows, ranks, wide ? ScalarType::Double : ScalarType::Float);
  visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    auto* out = static_cast<A*>(dots.mutable_data_ptr());
    const int64_t numel = layout.numel * reals_per_element(dtype);
    parallel_rows(num_rows, layout.bytes * ranks, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const auto* row = reinterpret_cast<const T*>(base + n * stride);
        for (int64_t j = 0; j < ranks; ++j) {
          const auto* other = reinterpret_cast<const T*>(slots.row(slot[n * ranks + j]));
          out[n * ranks + j] = other == nullptr ? A{0} : static_cast<A>(dot(row, other, numel));
        }
      }
    });
  });
  return dots;
}

}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CPU, m) {
  m.impl("row_dots", TORCH_BOX(&dynmm::row_dots));
}
