// route on a GPU: a stable counting sort of the entries by branch. Ranks come from the order of
// lanes, warps and blocks, never from atomics, so the plan is the same every time and as on the
// CPU.
#include <cmath>

#include "cuda/reduce.h"
#include "ops/route.h"

namespace dynmm {
namespace {

constexpr int kBlockThreads = 1024;
constexpr int kOneBlock = 16 * kBlockThreads;  // entries that one block sorts in one launch
constexpr int kTileEntries = kBlockThreads;    // entries before another block is asked for
constexpr int kMostTiles = 264;                // two for every multiprocessor of an H100
constexpr int kBatch = 4;                      // entries of a lane that are loaded together
constexpr int kSharedBytes = 47 * 1024;        // of 48: the rest is static

// How many entries were faulty, and the first of them (entries < 2^31).
struct Faults {
  int32_t count, first;

  // All lanes call this; entries ascend from call to call.
  __device__ void see(int branch, int64_t warp_entry) {
    const unsigned faulty = __ballot_sync(kAllLanes, branch == kFaulty);
    if (faulty == 0) return;
    if (count == 0) first = static_cast<int32_t>(warp_entry) + __ffs(faulty) - 1;
    count += __popc(faulty);
  }

  // Sums and minima of integers: the same in any order.
  __device__ void add_to(Faults* all) const {
    if (count == 0) return;
    atomicAdd(&all->count, count);
    atomicMin(&all->first, first);
  }
};

constexpr int32_t kNoEntry = INT32_MAX;

// Lanes of this warp with the same branch: adds them to `counter`, whose former value plus the rank
// of this lane is returned.
__device__ int32_t claim(int branch, int32_t* counters) {
  const unsigned same = __match_any_sync(kAllLanes, branch);
  const int lane = threadIdx.x % kWarp;
  int32_t before = 0;
  if (branch >= 0) before = counters[branch];
  __syncwarp();
  if (branch >= 0 && __ffs(same) - 1 == lane) counters[branch] = before + __popc(same);
  __syncwarp();
  return before + __popc(same & ((1u << lane) - 1));
}

// What a block begins with. Whole block.
__device__ void clear(int32_t* counters, int size, Faults* faults) {
  for (int i = threadIdx.x; i < size; i += blockDim.x) counters[i] = 0;
  if (threadIdx.x == 0) *faults = {0, kNoEntry};
}

// Of one branch: the counter of each warp becomes `sum` and those of earlier warps; returns `sum`
// and those of all.
__device__ int32_t scan_warps(int32_t* counters, int warps, int branches, int32_t sum) {
  constexpr int kTogether = 8;
  for (int first = 0; first < warps; first += kTogether) {
    int32_t count[kTogether];
#pragma unroll
    for (int w = 0; w < kTogether; ++w) {
      if (first + w < warps) count[w] = counters[(first + w) * branches];
    }
#pragma unroll
    for (int w = 0; w < kTogether; ++w) {
      if (first + w >= warps) break;
      counters[(first + w) * branches] = sum;
      sum += count[w];
    }
  }
  return sum;
}

// Exclusive prefix sum in place, by one warp.
__device__ void exclusive_scan(int32_t* values, int size, int32_t* total) {
  const int lane = threadIdx.x % kWarp;
  int32_t carry = 0;
  for (int at = 0; at < size; at += kWarp) {
    const int32_t own = at + lane < size ? values[at + lane] : 0;
    int32_t sum = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (at + lane < size) values[at + lane] = carry + sum - own;
    carry += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  if (lane == 0) *total = carry;
}

__device__ void write_header(const Plan& plan, const int32_t* offsets, int32_t total,
                             const Faults& faults) {
  for (int b = threadIdx.x; b < plan.branches; b += blockDim.x) plan.header[b] = offsets[b];
  if (threadIdx.x == 0) {
    plan.header[plan.branches] = total;
    plan.header[plan.branches + 1] = faults.count;
    plan.header[plan.branches + 2] = faults.count > 0 ? faults.first : -1;
  }
}

__device__ void place(const Plan& plan, int64_t entry, int branch, int32_t slot) {
  plan.inverse[entry] = branch >= 0 ? slot : -1;
  if (branch >= 0) plan.order[slot] = static_cast<int32_t>(entry);
}

// Slots first..stop-1 hold no entry. Whole block.
__device__ void leave_empty(const Plan& plan, int64_t first, int64_t stop) {
  for (int64_t slot = first + threadIdx.x; slot < stop; slot += blockDim.x) plan.order[slot] = -1;
}

// Up to 16 K entries in one launch. Warp w owns kItems * 32 consecutive entries and keeps their
// branches in registers. Shared memory: counters [warps][B], offsets [B].
template <int kItems, class Select>
__global__ void __launch_bounds__(kBlockThreads, 1)
    route_one_block(const Plan plan, const Select select) {
  extern __shared__ int32_t shared[];
  __shared__ Faults all_faults;
  __shared__ int32_t total;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int32_t* counters = shared;
  int32_t* offsets = shared + warps * plan.branches;
  clear(counters, warps * plan.branches, &all_faults);

  int branch[kItems];
  uint16_t rank[kItems];  // within the warp's kItems * 32 entries
  const int64_t first = static_cast<int64_t>(warp) * kItems * kWarp;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t entry = first + i * kWarp + lane;
    branch[i] = entry < plan.entries ? select(entry) : kNone;
  }
  __syncthreads();
  Faults faults{0, kNoEntry};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    faults.see(branch[i], first + i * kWarp);
    rank[i] = static_cast<uint16_t>(claim(branch[i], counters + warp * plan.branches));
  }
  if (lane == 0) faults.add_to(&all_faults);
  __syncthreads();
  for (int b = threadIdx.x; b < plan.branches; b += blockDim.x) {
    offsets[b] = scan_warps(counters + b, warps, plan.branches, 0);
  }
  __syncthreads();
  if (warp == 0) exclusive_scan(offsets, plan.branches, &total);
  __syncthreads();
  write_header(plan, offsets, total, all_faults);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t entry = first + i * kWarp + lane;
    if (entry >= plan.entries) continue;
    const int b = max(branch[i], 0);
    place(plan, entry, branch[i], offsets[b] + counters[warp * plan.branches + b] + rank[i]);
  }
  leave_empty(plan, total, plan.entries);
}

// Many entries, in two launches. Every block owns one run of `tile` entries, every warp of it a run
// of `span`. counts: [tiles][B], then [tiles] Faults.
struct Tiles {
  int32_t* counts;
  Faults* faults;
  int64_t tile, span;
};

// Calls visit(branch, entry of lane 0) for every kWarp entries of the span from `first` on. Whole
// warp; the branches of kBatch entries are asked for before the first is visited, as the barriers
// in claim() keep later loads behind them.
template <class Ask, class Visit>
__device__ void for_span(const Plan& plan, int64_t first, int64_t span, const Ask& ask,
                         const Visit& visit) {
  const int64_t stop = min(first + span, plan.entries);
  for (int64_t at = first; at < stop; at += kBatch * kWarp) {
    int branch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t entry = at + i * kWarp + threadIdx.x % kWarp;
      branch[i] = entry < stop ? ask(entry) : kNone;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (at + i * kWarp >= stop) break;
      visit(branch[i], at + i * kWarp);
    }
  }
}

template <class Select>
__global__ void __launch_bounds__(kBlockThreads, 1)
    count_tiles(const Plan plan, const Select select, const Tiles tiles) {
  extern __shared__ int32_t counters[];
  __shared__ Faults all_faults;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  clear(counters, warps * plan.branches, &all_faults);
  __syncthreads();
  const int64_t first = blockIdx.x * tiles.tile + warp * tiles.span;
  Faults faults{0, kNoEntry};
  for_span(plan, first, tiles.span, select, [&](int branch, int64_t at) {
    faults.see(branch, at);
    claim(branch, counters + warp * plan.branches);
  });
  if (lane == 0) faults.add_to(&all_faults);
  __syncthreads();
  for (int b = threadIdx.x; b < plan.branches; b += blockDim.x) {
    tiles.counts[blockIdx.x * plan.branches + b] =
        scan_warps(counters + b, warps, plan.branches, 0);
  }
  if (threadIdx.x == 0) tiles.faults[blockIdx.x] = all_faults;
}

// base[b]: entries of branch b in earlier tiles; totals[b]: in all tiles. Whole block: a warp for
// each branch where they are few, else a thread.
__device__ void base_and_totals(const Tiles& tiles, int branches, int32_t* base, int32_t* totals) {
  const bool few = branches <= blockDim.x / kWarp;
  const int lanes = few ? kWarp : 1, lane = threadIdx.x % lanes;
  for (int b = threadIdx.x / lanes; b < branches; b += blockDim.x / lanes) {
    int32_t before = 0, all = 0;
#pragma unroll 8
    for (int t = lane; t < gridDim.x; t += lanes) {
      const int32_t count = tiles.counts[t * branches + b];
      if (t < blockIdx.x) before += count;
      all += count;
    }
    if (few) {
      before = warp_sum(before);
      all = warp_sum(all);
    }
    if (lane > 0) continue;
    base[b] = before;
    totals[b] = all;
  }
}

// Shared memory: counters [warps][B], offsets [B], base [B]. Counters become the next slot of each
// warp and branch.
template <class Select>
__global__ void __launch_bounds__(kBlockThreads, 1)
    place_tiles(const Plan plan, const Select select, const Tiles tiles) {
  extern __shared__ int32_t shared[];
  __shared__ Faults all_faults;
  __shared__ int32_t total;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int32_t* counters = shared;
  int32_t* offsets = shared + warps * plan.branches;
  int32_t* base = offsets + plan.branches;
  clear(counters, warps * plan.branches, &all_faults);
  base_and_totals(tiles, plan.branches, base, offsets);
  __syncthreads();
  if (warp == 0) exclusive_scan(offsets, plan.branches, &total);
  const int64_t first = blockIdx.x * tiles.tile + warp * tiles.span;
  int32_t* own = counters + warp * plan.branches;
  const auto again = [&](int64_t entry) { return select.again(entry); };
  for_span(plan, first, tiles.span, again, [&](int branch, int64_t) { claim(branch, own); });
  __syncthreads();
  for (int b = threadIdx.x; b < plan.branches; b += blockDim.x) {
    scan_warps(counters + b, warps, plan.branches, offsets[b] + base[b]);
  }
  __syncthreads();
  for_span(plan, first, tiles.span, again, [&](int branch, int64_t at) {
    const int32_t slot = claim(branch, own);
    if (at + lane < plan.entries) place(plan, at + lane, branch, slot);
  });
  leave_empty(plan, max(blockIdx.x * tiles.tile, static_cast<int64_t>(total)),
              min((blockIdx.x + 1) * tiles.tile, plan.entries));
  if (blockIdx.x == 0) {
    for (int t = threadIdx.x; t < gridDim.x; t += blockDim.x) tiles.faults[t].add_to(&all_faults);
    __syncthreads();
    write_header(plan, offsets, total, all_faults);
  }
}

// As many warps as leave room for their counters and two more rows of B.
int64_t warps_that_fit(int64_t branches, int64_t wanted) {
  const int64_t rows = kSharedBytes / (static_cast<int64_t>(sizeof(int32_t)) * branches) - 2;
  if (rows < 1) {
    refuse("route: at most ", kSharedBytes / 12, " branches on a GPU; got ", branches);
  }
  return std::min<int64_t>({wanted, rows, kBlockThreads / kWarp});
}

// How many blocks share many entries. As each of them reads the counts of all, these stay few
// beside the entries.
int64_t tiles_of(int64_t entries, int64_t branches) {
  const auto most = static_cast<int64_t>(2 * std::sqrt(static_cast<double>(entries) / branches));
  return std::clamp<int64_t>(std::min(ceil_div<int64_t>(entries, kTileEntries), most), 1,
                             kMostTiles);
}

struct Sort : OnDevice {
  using OnDevice::OnDevice;

  template <class Select>
  void sort(const Plan& plan, const Select& select) const {
    const int64_t wanted = std::max<int64_t>(ceil_div<int64_t>(plan.entries, kWarp), 1);
    const int64_t warps = warps_that_fit(plan.branches, wanted);
    if (plan.entries <= std::min<int64_t>(kOneBlock, warps * kWarp * 16)) {
      in_one_block(plan, select, warps);
    } else {
      in_tiles(plan, select);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  template <class Select>
  void in_one_block(const Plan& plan, const Select& select, int64_t warps) const {
    const int64_t items = ceil_div<int64_t>(plan.entries, warps * kWarp);
    const auto threads = static_cast<unsigned>(warps * kWarp);
    const auto bytes = static_cast<unsigned>((warps + 1) * plan.branches * sizeof(int32_t));
    if (items <= 1) {
      route_one_block<1><<<1, threads, bytes, stream()>>>(plan, select);
    } else if (items <= 4) {
      route_one_block<4><<<1, threads, bytes, stream()>>>(plan, select);
    } else {
      route_one_block<16><<<1, threads, bytes, stream()>>>(plan, select);
    }
  }

  template <class Select>
  void in_tiles(const Plan& plan, const Select& select) const {
    const int64_t blocks = tiles_of(plan.entries, plan.branches);
    const int64_t warps = warps_that_fit(plan.branches, kBlockThreads / kWarp);
    const int64_t span = ceil_div(plan.entries, blocks * warps * kWarp) * kWarp;
    const int64_t counts = blocks * plan.branches;
    const Tensor scratch = empty_vector(device, counts + 2 * blocks, ScalarType::Int);
    auto* memory = static_cast<int32_t*>(scratch.mutable_data_ptr());
    const Tiles tiles{memory, reinterpret_cast<Faults*>(memory + counts), warps * span, span};
    const auto grid = static_cast<unsigned>(blocks), threads = static_cast<unsigned>(warps * kWarp);
    const auto row = static_cast<unsigned>(plan.branches * sizeof(int32_t));
    count_tiles<<<grid, threads, warps * row, stream()>>>(plan, select, tiles);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    place_tiles<<<grid, threads, (warps + 2) * row, stream()>>>(plan, select, tiles);
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("route", TORCH_BOX(&dynmm::route<dynmm::Sort>));
  m.impl("route_argmax", TORCH_BOX(&dynmm::route_argmax<dynmm::Sort>));
}
