#pragma once

#include <vector>

#include "cuda/launch.h"

namespace dynmm {

// Where each slot's row lies: outputs[i] holds the slots [start, stop), ascending. Passed to
// kernels by value, so that no table has to be copied to the device; kCapacity bounds its size.
template <int kCapacity>
struct SlotTable {
  const char* base[kCapacity];
  int64_t stride[kCapacity];  // bytes
  int32_t start[kCapacity];
  int32_t stop[kCapacity];
  int32_t count;

  // nullptr: no output holds this slot.
  __device__ const char* row(int32_t slot) const {
    int low = 0;
    for (int high = count; high - low > 1;) {
      const int middle = (low + high) / 2;
      if (start[middle] <= slot) {
        low = middle;
      } else {
        high = middle;
      }
    }
    if (slot < start[low] || slot >= stop[low]) return nullptr;
    return base[low] + static_cast<int64_t>(slot - start[low]) * stride[low];
  }
};

constexpr int kMostOutputs = 1024;  // 24 KB of the 32 KB that a kernel may be given

// The outputs in one layout, kept alive, and what their addresses have in common.
struct SlotRows {
  std::vector<Tensor> kept;
  const std::vector<int64_t>& starts;
  uint64_t bits = 0;

  SlotRows(const std::vector<Tensor>& outputs, const std::vector<int64_t>& starts,
           const RowLayout& layout)
      : starts(starts) {
    STD_TORCH_CHECK(outputs.size() <= kMostOutputs, "dynmm_kernels: at most ", kMostOutputs,
                    " outputs can be combined on a GPU; got ", outputs.size());
    for (const Tensor& output : outputs) {
      kept.push_back(in_layout(output, layout));
      bits |= address_bits(kept.back().const_data_ptr());
      if (output.size(0) > 1) bits |= static_cast<uint64_t>(row_stride_bytes(kept.back()));
    }
  }

  template <int kCapacity>
  SlotTable<kCapacity> table() const {
    SlotTable<kCapacity> table;
    table.count = static_cast<int32_t>(kept.size());
    for (size_t i = 0; i < kept.size(); ++i) {
      table.base[i] = static_cast<const char*>(kept[i].const_data_ptr());
      table.stride[i] = row_stride_bytes(kept[i]);
      table.start[i] = static_cast<int32_t>(starts[i]);
      table.stop[i] = static_cast<int32_t>(starts[i] + kept[i].size(0));
    }
    return table;
  }

  // f(table) with the smallest table that holds all outputs: small ones launch sooner.
  template <class F>
  void visit(const F& f) const {
    if (kept.size() <= 16) return f(table<16>());
    if (kept.size() <= 128) return f(table<128>());
    f(table<kMostOutputs>());
  }
};

}  // namespace dynmm
