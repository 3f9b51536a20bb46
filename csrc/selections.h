#pragma once

#include <cmath>

#include "dtypes.h"
#include "host_device.h"

namespace dynmm {

constexpr int kNone = -1;
constexpr int kFaulty = -2;

// A selection says for an entry: a branch, kNone or kFaulty. `again` repeats the answer later; then
// anything negative is no branch.
template <class T>
struct Choice {
  const T* choice;
  int branches;

  DYNMM_HOST_DEVICE int operator()(int64_t entry) const {
    const auto branch = static_cast<int64_t>(choice[entry]);
    return branch >= kNone && branch < branches ? static_cast<int>(branch) : kFaulty;
  }
  DYNMM_HOST_DEVICE int again(int64_t entry) const { return (*this)(entry); }
};

struct Mask {
  const bool* mask;
  int branches;

  DYNMM_HOST_DEVICE int operator()(int64_t entry) const {
    // 32 bits: entries < 2^31
    return mask[entry] ? static_cast<int>(static_cast<uint32_t>(entry) % branches) : kNone;
  }
  DYNMM_HOST_DEVICE int again(int64_t entry) const { return (*this)(entry); }
};

// The first of the largest logits; faulty where softmax is undefined (nan, no finite maximum).
template <class T>
struct Argmax {
  const T* logits;
  int64_t* choice;
  int branches;

  DYNMM_HOST_DEVICE int operator()(int64_t row) const {
    using Number = Accumulator<T>;
    const T* values = logits + row * branches;
    Number top = static_cast<Number>(values[0]);
    bool ordered = !std::isnan(top);
    int best = 0;
    for (int b = 1; b < branches; ++b) {
      const Number value = static_cast<Number>(values[b]);
      ordered &= !std::isnan(value);
      if (value > top) {
        top = value;
        best = b;
      }
    }
    const bool fine = ordered && std::isfinite(top);
    choice[row] = fine ? best : kNone;
    return fine ? best : kFaulty;
  }
  DYNMM_HOST_DEVICE int again(int64_t row) const { return static_cast<int>(choice[row]); }
};

}  // namespace dynmm
