#pragma once

#include "ops/slots.h"

namespace dynmm {

// combine_rows: out[n] = sum_j weights[n, j] * row(inverse[n, j]), zero where there is no row.
//
// Backend: move(slots, inverse, rows, bytes, out), and
// sum<T>(slots, inverse, weights or null, rows, ranks, numel, out).
template <class Backend>
Tensor combine_rows(std::vector<Tensor> outputs, std::vector<int64_t> starts, const Tensor& inverse,
                    std::optional<Tensor> weights) {
  const char* op = "combine_rows";
  const Operand index(inverse);
  const std::vector<Operand> from(outputs.begin(), outputs.end());
  const std::optional<Operand> scale = weights ? std::optional<Operand>(*weights) : std::nullopt;
  for (const Operand& output : from) check_device(op, output, "inverse", index.device);
  if (scale) check_device(op, *scale, "inverse", index.device);
  check_slots(op, from, starts, index);
  const ScalarType dtype = from[0].dtype;
  const int64_t rows = index.sizes[0], ranks = index.sizes[1];
  if (scale) {
    check_weights(op, "output", 0, from[0], *scale, rows * ranks, "inverse");
  } else if (ranks > 1 && !is_summed(dtype)) {
    refuse(op, ": ", name_of(dtype), " cannot be summed; convert to a floating dtype");
  }

  const Backend backend(index.device);
  const Tensor contiguous = as_contiguous(index);
  const auto* slot = data_of<int32_t>(contiguous);
  const RowLayout layout(from[0]);
  const bool moved = ranks == 1 && !weights;
  Copies copies(!moved);
  const Slots slots(from, starts, layout, copies);
  const Tensor out = empty_rows(from[0], rows, layout.strides.data());
  if (rows == 0 || layout.bytes == 0) return out;
  if (moved) {
    backend.move(slots, slot, rows, layout.bytes, static_cast<char*>(out.mutable_data_ptr()));
    return out;
  }
  const std::optional<Tensor> factors = scale ? std::optional(as_contiguous(*scale)) : std::nullopt;
  visit_summed(dtype, [&](auto zero) {
    using T = decltype(zero);
    backend.template sum<T>(slots, slot, factors ? data_of<Accumulator<T>>(*factors) : nullptr,
                            rows, ranks, layout.numel * reals_per_element(dtype),
                            static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace dynmm
