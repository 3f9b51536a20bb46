#pragma once

#include "cuda/launch.h"

namespace dynmm {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks that share one sum at most; their parts lie in memory until they are added.
constexpr int64_t kMostParts = 64;

// Of the sums of A that lie in memory.
template <class A>
constexpr ScalarType kSumDtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// The sum over a block, in an order that never changes; valid in thread 0.
template <class A>
__device__ A block_sum(A sum) {
  __shared__ A warp_sums[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, step);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) sum += warp_sums[w];
  return sum;
}

}  // namespace dynmm
