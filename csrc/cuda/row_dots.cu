// row_dots: dots[n, j] = <rows[n], row(inverse[n, j])>, zero where there is no row.
#include "cuda/slots.h"

namespace dynmm {
namespace {

constexpr int64_t kUnitsPerPart = 8 * kPieces;  // units of one row that one block takes
constexpr int64_t kMostParts = 64;
constexpr int kWarp = 32;

// float, double for fp64, also for integers: a weight's gradient is a real number.
template <class T>
using Dot = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The sum over a block, in an order that never changes; valid in thread 0.
template <class A>
__device__ A block_sum(A sum) {
  __shared__ A warp_sums[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) sum += warp_sums[w];
  return sum;
}

// Block (entry, part) sums its part of the entry's product into parts[entry, part].
template <class T, int kValues, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    row_dot_parts(const __grid_constant__ SlotTable<kCapacity> slots, const char* rows,
                  int64_t row_stride, const int32_t* inverse, int ranks, int64_t units,
                  int64_t units_per_part, Dot<T>* parts) {
  using A = Dot<T>;
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
  if (threadIdx.x == 0) parts[entry * gridDim.y + part] = sum;
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    add_parts(const A* parts, int64_t entries, int64_t parts_per_entry, A* dots) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= entries) return;
  A sum = 0;
  for (int64_t p = 0; p < parts_per_entry; ++p) sum += parts[entry * parts_per_entry + p];
  dots[entry] = sum;
}

}  // namespace

Tensor row_dots(const Tensor& rows, std::vector<Tensor> outputs, std::vector<int64_t> starts,
                const Tensor& inverse) {
  const OnDeviceOf device(inverse);
  const cudaStream_t stream = device.stream();
  const Tensor index = as_contiguous(inverse);
  const auto* slot = static_cast<const int32_t*>(index.const_data_ptr());
  const int64_t num_rows = inverse.size(0), ranks = inverse.size(1), entries = num_rows * ranks;
  const ScalarType dtype = rows.scalar_type();
  const RowLayout layout(rows);
  const Tensor blocks = as_blocks(rows, layout);
  const SlotRows rows_of(outputs, starts, layout);
  const auto* base = static_cast<const char*>(blocks.const_data_ptr());
  const int64_t stride = row_stride_bytes(blocks);
  const ScalarType wide = accumulates_in_double(dtype) ? ScalarType::Double : ScalarType::Float;
  const Tensor dots = empty_matrix(rows, num_rows, ranks, wide);
  if (entries == 0) return dots;
  const uint64_t bits = rows_of.bits | address_bits(base) | static_cast<uint64_t>(stride) |
                        static_cast<uint64_t>(layout.bytes);
  visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Dot<T>;
    const auto launch = [&](auto values) {
      constexpr int kValues = decltype(values)::value;
      const int64_t units = layout.bytes / static_cast<int64_t>(sizeof(T) * kValues);
      const int64_t parts = std::clamp<int64_t>(ceil_div(units, kUnitsPerPart), 1, kMostParts);
      const Tensor partial = parts > 1 ? empty_matrix(rows, entries, parts, wide) : dots;
      auto* sums = static_cast<A*>(partial.mutable_data_ptr());
      const dim3 grid(static_cast<unsigned>(entries), static_cast<unsigned>(parts));
      rows_of.visit([&](const auto& slots) {
        row_dot_parts<T, kValues><<<grid, kThreads, 0, stream>>>(slots, base, stride, slot,
                                                                 static_cast<int>(ranks), units,
                                                                 ceil_div(units, parts), sums);
      });
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      if (parts == 1) return;
      add_parts<<<static_cast<unsigned>(ceil_div<int64_t>(entries, kThreads)), kThreads, 0,
                  stream>>>(sums, entries, parts, static_cast<A*>(dots.mutable_data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (access_width(bits) == 16) {
      launch(std::integral_constant<int, kWideValues<T>>{});
    } else {
      launch(std::integral_constant<int, 1>{});
    }
  });
  return dots;
}

}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("row_dots", TORCH_BOX(&dynmm::row_dots));
}
