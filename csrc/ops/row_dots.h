#pragma once

#include "ops/slots.h"

namespace dynmm {

// row_dots: dots[n, j] = <rows[n], row(inverse[n, j])>, zero where there is no row.
//
// Backend: dots<T>(slots, rows, inverse, num_rows, ranks, numel, dots).
template <class Backend>
Tensor row_dots(const Tensor& rows, std::vector<Tensor> outputs, std::vector<int64_t> starts,
                const Tensor& inverse) {
  const char* op = "row_dots";
  const Operand index(inverse), left(rows);
  const std::vector<Operand> right(outputs.begin(), outputs.end());
  check_device(op, left, "inverse", index.device);
  for (const Operand& output : right) check_device(op, output, "inverse", index.device);
  check_slots(op, right, starts, index);
  const ScalarType dtype = right[0].dtype;
  if (!is_weighted(dtype)) {
    refuse(op, ": output 0 must be floating or complex; got ", told(right[0]));
  }
  if (!same_rows(left, right[0]) || left.rows() != index.rows()) {
    std::vector<int64_t> wanted(right[0].sizes.begin(), right[0].sizes.end());
    wanted[0] = index.rows();
    refuse(op, ": rows must be ", name_of(dtype), " ", list_of(wanted), "; got ", told(left));
  }

  const Backend backend(index.device);
  const Tensor contiguous = as_contiguous(index);
  const int64_t num_rows = index.sizes[0], ranks = index.sizes[1];
  const RowLayout layout(left);
  Copies copies(true);
  const Blocks blocks = copies.blocks_of(left, layout);
  const Slots slots(right, starts, layout, copies);
  const Tensor dots = empty_matrix(index.device, num_rows, ranks, weight_dtype(dtype));
  if (num_rows == 0) return dots;
  visit_weighted(dtype, [&](auto zero) {
    using T = decltype(zero);
    backend.template dots<T>(slots, blocks, data_of<int32_t>(contiguous), num_rows, ranks,
                             layout.numel * reals_per_element(dtype), dots);
  });
  return dots;
}

}  // namespace dynmm
