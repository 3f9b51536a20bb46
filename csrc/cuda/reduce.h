#pragma once

#include "cuda/launch.h"

namespace dynmm {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// How many blocks share a sum of `units`: one for `each` of them, but not too many. Their parts lie
// in memory until add_parts.
inline int64_t parts_of(int64_t units, int64_t each) {
  return std::clamp<int64_t>(ceil_div(units, each), 1, 64);
}

// Of the sums of A that lie in memory.
template <class A>
constexpr ScalarType kSumDtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// The sum over a warp, in every lane.
__device__ inline int32_t warp_sum(int32_t sum) {
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

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

// The sums over parts [1 or 2, count, entries], in ascending order; the block's y says which.
template <class A>
__global__ void __launch_bounds__(kThreads)
    add_parts(const A* parts, int64_t count, int64_t entries, A* first, A* second) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= entries) return;
  const A* from = parts + blockIdx.y * count * entries + i;
  A sum = 0;
  for (int64_t p = 0; p < count; ++p) sum += from[p * entries];
  (blockIdx.y == 0 ? first : second)[i] = sum;
}

}  // namespace dynmm
