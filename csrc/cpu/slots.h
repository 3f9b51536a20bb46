#pragma once

#include <algorithm>

#include "cpu/parallel.h"

namespace dynmm {

// Where each slot's row lies: outputs[i] holds the slots [starts[i], starts[i] + rows), ascending.
class Slots {
 public:
  // Every output is brought to `layout`, that of outputs[0], so that rows match byte for byte.
  Slots(const std::vector<Tensor>& outputs, const std::vector<int64_t>& starts,
        const RowLayout& layout)
      : starts_(starts) {
    blocks_.reserve(outputs.size());
    for (const Tensor& output : outputs) {
      const Tensor rows = in_layout(output, layout);
      blocks_.push_back({rows, static_cast<const char*>(rows.const_data_ptr()),
                         row_stride_bytes(rows), rows.size(0)});
    }
  }

  // nullptr: no output holds this slot.
  const char* row(int64_t slot) const {
    if (slot < 0) return nullptr;
    const auto after = starts_.size() <= 8
                           ? std::find_if(starts_.begin(), starts_.end(),
                                          [slot](int64_t start) { return start > slot; })
                           : std::upper_bound(starts_.begin(), starts_.end(), slot);
    if (after == starts_.begin()) return nullptr;
    const size_t i = static_cast<size_t>(after - starts_.begin()) - 1;
    const int64_t local = slot - starts_[i];
    return local < blocks_[i].rows ? blocks_[i].base + local * blocks_[i].stride : nullptr;
  }

 private:
  struct Block {
    Tensor kept;  // alive as long as `base` is read
    const char* base;
    int64_t stride, rows;
  };

  const std::vector<int64_t>& starts_;
  std::vector<Block> blocks_;
};

}  // namespace dynmm
