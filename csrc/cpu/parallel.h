#pragma once

#include <algorithm>

#include "tensors.h"

namespace dynmm {

// What a backend on the CPU begins with: nothing has to be made current.
struct OnCpu {
  explicit OnCpu(Device) {}
};

// Below this much work per thread, starting the thread costs more than it saves.
constexpr int64_t kBytesPerThread = 64 * 1024;

// f(begin, end) over rows of `row_bytes` each, on torch's own threads.
template <class F>
void parallel_rows(int64_t rows, int64_t row_bytes, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, row_bytes));
  if (rows <= grain) {
    if (rows > 0) f(int64_t{0}, rows);
    return;
  }
  torch::stable::parallel_for(0, rows, grain, f);
}

}  // namespace dynmm
