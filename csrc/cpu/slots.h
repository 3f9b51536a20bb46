#pragma once

#include "cpu/parallel.h"
#include "ops/slots.h"

namespace dynmm {

// nullptr: no output holds this slot.
inline const char* row_of(const Slots& slots, int64_t slot) {
  const auto begin = slots.outputs.begin(), end = slots.outputs.end();
  const auto behind = [slot](const Slots::Output& output) { return output.start > slot; };
  const auto after = slots.outputs.size() <= 8
                         ? std::find_if(begin, end, behind)
                         : std::partition_point(begin, end, std::not_fn(behind));
  if (after == begin) return nullptr;
  const Slots::Output& output = *(after - 1);
  return slot < output.stop ? output.base + (slot - output.start) * output.stride : nullptr;
}

}  // namespace dynmm
