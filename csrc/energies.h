#pragma once

#include "dtypes.h"
#include "host_device.h"

namespace dynmm {

constexpr int kMostModalities = 8;

// Where the weights come from, in the order of ops/checks.py.
enum Weighting : int { kEnergy, kSoftmax, kUniform, kGiven };

// The logits of M modalities, [N, C] each, and what weighs and judges them, as kernels see them.
template <class T>
struct Judged {
  using A = Accumulator<T>;

  Maps<const T> logits[kMostModalities];
  const int64_t* named;  // [N]: the class of each sample, whatever its value; or null
  const A* labels;       // [N, C]; or null. At most one of the two is given
  const bool* present;   // [N, M]; or null: all are
  const A* weights;      // [N, M], of kGiven; or null
  int64_t rows, classes;
  int modalities;
  Weighting weighting;
  A scale;
};

template <class T>
struct Fused {
  using A = Accumulator<T>;

  T* fused;       // [N, C]
  A* confidence;  // [N, M]
  A* losses;      // [N, M + 1]; or null: there are no targets
  A* energies;    // [N, M + 1]
};

template <class T>
struct Incoming {
  using A = Accumulator<T>;

  const A* energies;    // [N, M + 1]
  Maps<const T> fused;  // [N, C]; or a null base: zeros
  const A* confidence;  // [N, M]; or null: zeros
  const A* losses;      // [N, M + 1]; or null: zeros
  bool detach;
};

template <class T>
struct Outgoing {
  T* logits[kMostModalities];  // [N, C] each
  Accumulator<T>* weights;     // [N, M], of kGiven; or null
};

}  // namespace dynmm
