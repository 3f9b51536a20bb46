// row_dots on a GPU: a block for every entry, or for every part of it where rows are long.
#include "cuda/reduce.h"
#include "cuda/slots.h"
#include "ops/row_dots.h"

namespace dynmm {
namespace {

constexpr int64_t kUnitsPerPart = 8 * kPieces;  // units of one row that one block takes

// Block (entry, part) sums its part of the entry's product into parts[part, entry].
template <class T, int kValues, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    row_dot_parts(const __grid_constant__ SlotTable<kCapacity> slots, const char* rows,
                  int64_t row_stride, const int32_t* inverse, int ranks, int64_t units,
                  int64_t units_per_part, Accumulator<T>* parts) {
  using A = Accumulator<T>;
  const int64_t entry = blockIdx.x;
  const int64_t part = blockIdx.y;
  const auto* other = reinterpret_cast<const Unit<T, kValues>*>(slots.row(inverse[entry]));
  const auto* row = reinterpret_cast<const Unit<T, kValues>*>(rows + entry / ranks * row_stride);
  A sum = 0;
  if (other != nullptr) {
    const int64_t stop = min((part + 1) * units_per_part, units);
#pragma unroll 4
    for (int64_t i = part * units_per_part + threadIdx.x; i < stop; i += kThreads) {
      const Unit<T, kValues> a = row[i], b = other[i];
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        sum += static_cast<A>(a.value[v]) * static_cast<A>(b.value[v]);
      }
    }
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
      const int64_t parts = parts_of(units, kUnitsPerPart);
      const Tensor partial = parts > 1 ? empty_matrix(device, parts, entries, kSumDtype<A>) : dots;
      auto* sums = static_cast<A*>(partial.mutable_data_ptr());
      const dim3 grid(static_cast<unsigned>(entries), static_cast<unsigned>(parts));
      visit_table("row_dots", slots, [&](const auto& table) {
        row_dot_parts<T, kValues><<<grid, kThreads, 0, stream()>>>(
            table, rows.base, rows.stride, inverse, static_cast<int>(ranks), units,
            ceil_div(units, parts), sums);
      });
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      if (parts == 1) return;
      const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(entries, kThreads));
      add_parts<<<blocks, kThreads, 0, stream()>>>(sums, parts, entries, out, out);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("row_dots", TORCH_BOX(&dynmm::row_dots<dynmm::Dots>));
}
