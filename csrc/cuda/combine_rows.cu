// combine_rows on a GPU: rows are moved whole, or summed, in units of up to 16 bytes.
#include "cuda/slots.h"
#include "ops/combine_rows.h"

namespace dynmm {
namespace {

template <class T, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    combine_bytes(const __grid_constant__ SlotTable<kCapacity> slots,
                  const __grid_constant__ Tiling tiling, const int32_t* inverse, int64_t rows,
                  T* out) {
  T value[kUnroll];
  int64_t row, unit;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (!locate(tiling, blockIdx.x, threadIdx.x + i * kThreads, rows, &row, &unit)) continue;
    const auto* from = reinterpret_cast<const T*>(slots.row(inverse[row]));
    value[i] = from == nullptr ? T{} : from[unit];
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (!locate(tiling, blockIdx.x, threadIdx.x + i * kThreads, rows, &row, &unit)) continue;
    out[row * tiling.units + unit] = value[i];
  }
}

// The ranks of a row are added in ascending order, each product rounded before it is added, as on
// the CPU. weights: [N, k], or null for ones.
template <class T, int kValues, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    combine_sums(const __grid_constant__ SlotTable<kCapacity> slots,
                 const __grid_constant__ Tiling tiling, const int32_t* inverse,
                 const Accumulator<T>* weights, int64_t rows, int ranks, Unit<T, kValues>* out) {
  using A = Accumulator<T>;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    int64_t row, unit;
    if (!locate(tiling, blockIdx.x, threadIdx.x + i * kThreads, rows, &row, &unit)) continue;
    A sum[kValues] = {};
    for (int j = 0; j < ranks; ++j) {
      const auto* from =
          reinterpret_cast<const Unit<T, kValues>*>(slots.row(inverse[row * ranks + j]));
      if (from == nullptr) continue;
      const Unit<T, kValues> term = from[unit];
      const A weight = weights == nullptr ? A{1} : weights[row * ranks + j];
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        sum[v] += weight * static_cast<A>(term.value[v]);
      }
    }
    Unit<T, kValues> total;
#pragma unroll
    for (int v = 0; v < kValues; ++v) total.value[v] = static_cast<T>(sum[v]);
    out[row * tiling.units + unit] = total;
  }
}

struct Combine : OnDevice {
  using OnDevice::OnDevice;

  void move(const Slots& slots, const int32_t* inverse, int64_t rows, int64_t bytes,
            char* out) const {
    visit_width(slots.bits | address_bits(out) | static_cast<uint64_t>(bytes), [&](auto unit) {
      using T = decltype(unit);
      const Tiling tiling(rows, bytes / static_cast<int64_t>(sizeof(T)));
      visit_table("combine_rows", slots, [&](const auto& table) {
        combine_bytes<T><<<static_cast<unsigned>(tiling.blocks), kThreads, 0, stream()>>>(
            table, tiling, inverse, rows, reinterpret_cast<T*>(out));
      });
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class T>
  void sum(const Slots& slots, const int32_t* inverse, const Accumulator<T>* weights, int64_t rows,
           int64_t ranks, int64_t numel, T* out) const {
    const uint64_t bits = slots.bits | address_bits(out) | static_cast<uint64_t>(numel) * sizeof(T);
    visit_values<T>(bits, [&](auto values) {
      constexpr int kValues = decltype(values)::value;
      const Tiling tiling(rows, numel / kValues);
      visit_table("combine_rows", slots, [&](const auto& table) {
        combine_sums<T, kValues><<<static_cast<unsigned>(tiling.blocks), kThreads, 0, stream()>>>(
            table, tiling, inverse, weights, rows, static_cast<int>(ranks),
            reinterpret_cast<Unit<T, kValues>*>(out));
      });
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("combine_rows", TORCH_BOX(&dynmm::combine_rows<dynmm::Combine>));
  m.impl("combine_rows.traced", TORCH_BOX(&dynmm::combine_rows<dynmm::Combine>));
}
