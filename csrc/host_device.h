#pragma once

#include <cstdint>

// Marks what kernels and the host share.
#ifdef __CUDACC__
#define DYNMM_HOST_DEVICE __host__ __device__
#else
#define DYNMM_HOST_DEVICE
#endif

namespace dynmm {

// Samples `stride` elements apart, as kernels see them.
template <class T>
struct Maps {
  T* base;
  int64_t stride;

  DYNMM_HOST_DEVICE T* sample(int64_t n) const { return base + n * stride; }
};

}  // namespace dynmm
