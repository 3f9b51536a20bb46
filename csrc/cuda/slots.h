#pragma once

#include "cuda/launch.h"
#include "ops/slots.h"

namespace dynmm {

// `Slots` as kernels see them. Passed by value, so that no table has to be copied to the device;
// kCapacity bounds its size.
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

constexpr size_t kMostOutputs = 1024;  // 24 KB of the 32 KB that a kernel may be given

template <int kCapacity>
SlotTable<kCapacity> table_of(const Slots& slots) {
  SlotTable<kCapacity> table;
  table.count = static_cast<int32_t>(slots.outputs.size());
  for (size_t i = 0; i < slots.outputs.size(); ++i) {
    const Slots::Output& output = slots.outputs[i];
    table.base[i] = output.base;
    table.stride[i] = output.stride;
    table.start[i] = output.start;
    table.stop[i] = output.stop;
  }
  return table;
}

// f(table) with the smallest table that holds all outputs: small ones launch sooner.
template <class F>
void visit_table(const char* op, const Slots& slots, const F& f) {
  const size_t outputs = slots.outputs.size();
  if (outputs <= 16) return f(table_of<16>(slots));
  if (outputs <= 128) return f(table_of<128>(slots));
  if (outputs <= kMostOutputs) return f(table_of<kMostOutputs>(slots));
  refuse(op, ": at most ", kMostOutputs, " outputs on a GPU; got ", outputs);
}

}  // namespace dynmm
