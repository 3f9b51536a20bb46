// row_dots on a GPU: a few lanes for every entry where rows are short, else a block for every entry
// or, where rows are long, for every part of it. The order of a sum depends on the row's size
// alone.
#include "cuda/reduce.h"
#include "cuda/slots.h"
#include "ops/row_dots.h"

namespace dynmm {
namespace {

constexpr int64_t kShortUnits = 8 * kWarp;      // units of the longest row that one warp takes
constexpr int kFewLanes = 8;                    // take a row of up to four units each
constexpr int64_t kUnitsPerPart = 8 * kPieces;  // units of one row that one block takes

// The product of two rows over the units first, first + kStep, ... below stop.
template <class T, int kValues, int kStep, class Index>
__device__ Accumulator<T> product(const char* left, const char* right, Index first, Index stop) {
  using A = Accumulator<T>;
  const auto* a = reinterpret_cast<const Unit<T, kValues>*>(left);
  const auto* b = reinterpret_cast<const Unit<T, kValues>*>(right);
  A sum = 0;
#pragma unroll 4
  for (Index i = first; i < stop; i += kStep) {
    const Unit<T, kValues> x = a[i], y = b[i];
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      sum += static_cast<A>(x.value[v]) * static_cast<A>(y.value[v]);
    }
  }
  return sum;
}

// kLanes lanes of a warp take one entry.
template <class T, int kValues, int kLanes, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    row_dot_lanes(const __grid_constant__ SlotTable<kCapacity> slots, const char* rows,
                  int64_t row_stride, const int32_t* inverse, int64_t entries, int ranks, int units,
                  Accumulator<T>* dots) {
  const int lane = threadIdx.x % kLanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes);
  const int64_t entry = first + threadIdx.x / kLanes;
  const char* other = entry < entries ? slots.row(inverse[entry]) : nullptr;
  Accumulator<T> sum = 0;
  if (other != nullptr) {
    const char* row = rows + (ranks == 1 ? entry : entry / ranks) * row_stride;
    sum = product<T, kValues, kLanes>(row, other, lane, units);
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, step);
  if (lane == 0 && entry < entries) dots[entry] = sum;
}

// Block (entry, part) sums its part of the entry's product into parts[part, entry].
template <class T, int kValues, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    row_dot_parts(const __grid_constant__ SlotTable<kCapacity> slots, const char* rows,
                  int64_t row_stride, const int32_t* inverse, int ranks, int64_t units,
                  int64_t units_per_part, Accumulator<T>* parts) {
  const int64_t entry = blockIdx.x;
  const int64_t part = blockIdx.y;
  const char* other = slots.row(inverse[entry]);
  Accumulator<T> sum = 0;
  if (other != nullptr) {
    const int64_t first = part * units_per_part;
    const int64_t stop = min(first + units_per_part, units);
    const char* row = rows + entry / ranks * row_stride;
    sum = product<T, kValues, kThreads>(row, other, first + threadIdx.x, stop);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) parts[part * gridDim.x + entry] = sum;
}

struct Dots : OnDevice {
  using OnDevice::OnDevice;

  template <class T, class A = Accumulator<T>>
  void dots(const Slots& slots, const Blocks& rows, const int32_t* inverse, int64_t num_rows,
            int64_t ranks, int64_t numel, const Tensor& dots) const {
    const int64_t entries = num_rows * ranks;
    auto* out = static_cast<A*>(dots.mutable_data_ptr());
    const uint64_t bits = slots.bits | address_bits(rows.base) |
                          static_cast<uint64_t>(rows.stride) |
                          static_cast<uint64_t>(numel) * sizeof(T);
    visit_values<T>(bits, [&](auto values) {
      constexpr int kValues = decltype(values)::value;
      const int64_t units = numel / kValues;
      visit_table("row_dots", slots, [&](const auto& table) {
        if (units <= 4 * kFewLanes) {
          in_lanes<T, kValues, kFewLanes>(table, rows, inverse, entries, ranks, units, out);
        } else if (units <= kShortUnits) {
          in_lanes<T, kValues, kWarp>(table, rows, inverse, entries, ranks, units, out);
        } else {
          in_blocks<T, kValues>(table, rows, inverse, entries, ranks, units, out);
        }
      });
    });
  }

 private:
  template <class T, int kValues, int kLanes, class Table>
  void in_lanes(const Table& table, const Blocks& rows, const int32_t* inverse, int64_t entries,
                int64_t ranks, int64_t units, Accumulator<T>* out) const {
    const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(entries, kThreads / kLanes));
    row_dot_lanes<T, kValues, kLanes>
        <<<blocks, kThreads, 0, stream()>>>(table, rows.base, rows.stride, inverse, entries,
                                            static_cast<int>(ranks), static_cast<int>(units), out);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class T, int kValues, class Table, class A = Accumulator<T>>
  void in_blocks(const Table& table, const Blocks& rows, const int32_t* inverse, int64_t entries,
                 int64_t ranks, int64_t units, A* out) const {
    const int64_t parts = parts_of(units, kUnitsPerPart);
    std::optional<Tensor> partial;
    if (parts > 1) partial = empty_matrix(device, parts, entries, kSumDtype<A>);
    A* sums = partial ? static_cast<A*>(partial->mutable_data_ptr()) : out;
    const dim3 grid(static_cast<unsigned>(entries), static_cast<unsigned>(parts));
    row_dot_parts<T, kValues><<<grid, kThreads, 0, stream()>>>(table, rows.base, rows.stride,
                                                               inverse, static_cast<int>(ranks),
                                                               units, ceil_div(units, parts), sums);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (parts == 1) return;
    const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(entries, kThreads));
    add_parts<<<blocks, kThreads, 0, stream()>>>(sums, parts, entries, out, out);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("row_dots", TORCH_BOX(&dynmm::row_dots<dynmm::Dots>));
  m.impl("row_dots.traced", TORCH_BOX(&dynmm::row_dots<dynmm::Dots>));
}
