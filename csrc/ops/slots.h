#pragma once

#include "ops/refusals.h"
#include "rows.h"

namespace dynmm {

// Where each slot's row lies: outputs[i] holds the slots [start, stop), ascending.
struct Slots {
  struct Output {
    const char* base;
    int64_t stride;  // bytes
    int32_t start, stop;
  };

  std::vector<Output> outputs;
  uint64_t bits = 0;  // of the addresses at which rows begin

  // Every output is brought to `layout`, so that rows match byte for byte; `copies` outlives this.
  Slots(const std::vector<Operand>& tensors, const std::vector<int64_t>& starts,
        const RowLayout& layout, Copies& copies) {
    outputs.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Blocks rows = copies.blocks_of(tensors[i], layout);
      const auto start = static_cast<int32_t>(starts[i]);
      const int32_t stop = start + static_cast<int32_t>(tensors[i].rows());
      outputs.push_back({rows.base, rows.stride, start, stop});
      bits |= address_bits(rows.base);
      if (stop > start + 1) bits |= static_cast<uint64_t>(rows.stride);
    }
  }
};

inline void check_slots(const char* op, const std::vector<Operand>& outputs,
                        const std::vector<int64_t>& starts, const Operand& inverse) {
  if (inverse.dtype != ScalarType::Int || inverse.dims() != 2 || inverse.sizes[1] < 1) {
    refuse(op, ": inverse must be int32 [N, k>=1]; got ", told(inverse));
  }
  if (outputs.empty()) refuse(op, ": wanted at least one output; got none");
  if (starts.size() != outputs.size()) {
    refuse(op, ": wanted one start per output, ", outputs.size(), "; got ", starts.size());
  }
  int64_t stop = 0;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const Operand& output = outputs[i];
    if (output.dims() < 1) refuse(op, ": output ", i, " must be [n, ...]; got ", told(output));
    if (!same_rows(output, outputs[0])) {
      refuse(op, ": output ", i, " must be like output 0, ", told(outputs[0]), "; got ",
             told(output));
    }
    if (starts[i] < stop) {
      refuse(op, ": output ", i, " must start at slot ", stop, " or behind; got ", starts[i]);
    }
    // Unsigned: the sum of two numbers from 0 on cannot overflow.
    const uint64_t end = static_cast<uint64_t>(starts[i]) + static_cast<uint64_t>(output.rows());
    if (end > kMostSlots) {
      refuse(op, ": output ", i, " must end at slot ", kMostSlots, " or before; got ", end);
    }
    stop = static_cast<int64_t>(end);
  }
}

}  // namespace dynmm
