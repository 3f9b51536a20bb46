// combine_rows: out[n] = sum_j weights[n, j] * row(inverse[n, j]), zero where there is no row.
#include "cuda/slots.h"

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

template <class T>
void move_rows(const SlotRows& rows_of, const int32_t* inverse, int64_t rows, int64_t bytes,
               void* out, cudaStream_t stream) {
  const Tiling tiling(rows, bytes / static_cast<int64_t>(sizeof(T)));
  rows_of.visit([&](const auto& slots) {
    combine_bytes<T><<<static_cast<unsigned>(tiling.blocks), kThreads, 0, stream>>>(
        slots, tiling, inverse, rows, static_cast<T*>(out));
  });
}

void move_rows_by_width(const SlotRows& rows_of, const int32_t* inverse, int64_t rows,
                        int64_t bytes, void* out, cudaStream_t stream) {
  switch (access_width(rows_of.bits | address_bits(out) | static_cast<uint64_t>(bytes))) {
    case 16:
      return move_rows<Bytes16>(rows_of, inverse, rows, bytes, out, stream);
    case 8:
      return move_rows<uint64_t>(rows_of, inverse, rows, bytes, out, stream);
    case 4:
      return move_rows<uint32_t>(rows_of, inverse, rows, bytes, out, stream);
    case 2:
      return move_rows<uint16_t>(rows_of, inverse, rows, bytes, out, stream);
    default:
      return move_rows<uint8_t>(rows_of, inverse, rows, bytes, out, stream);
  }
}

template <class T, int kValues>
void sum_rows(const SlotRows& rows_of, const int32_t* inverse, const Accumulator<T>* weights,
              int64_t rows, int64_t ranks, int64_t numel, void* out, cudaStream_t stream) {
  const Tiling tiling(rows, numel / kValues);
  rows_of.visit([&](const auto& slots) {
    combine_sums<T, kValues><<<static_cast<unsigned>(tiling.blocks), kThreads, 0, stream>>>(
        slots, tiling, inverse, weights, rows, static_cast<int>(ranks),
        static_cast<Unit<T, kValues>*>(out));
  });
}

}  // namespace

Tensor combine_rows(std::vector<Tensor> outputs, std::vector<int64_t> starts, const Tensor& inverse,
                    std::optional<Tensor> weights) {
  const OnDeviceOf device(inverse);
  const cudaStream_t stream = device.stream();
  const Tensor index = as_contiguous(inverse);
  const auto* slot = static_cast<const int32_t*>(index.const_data_ptr());
  const int64_t rows = inverse.size(0), ranks = inverse.size(1);
  const ScalarType dtype = outputs[0].scalar_type();
  const RowLayout layout(outputs[0]);
  const SlotRows rows_of(outputs, starts, layout);
  const Tensor out = empty_rows(outputs[0], rows, layout);
  void* to = out.mutable_data_ptr();
  if (rows == 0 || layout.bytes == 0) return out;
  if (ranks == 1 && !weights) {
    move_rows_by_width(rows_of, slot, rows, layout.bytes, to, stream);
  } else {
    const std::optional<Tensor> scale =
        weights ? std::optional(as_contiguous(*weights)) : std::nullopt;
    const uint64_t bits = rows_of.bits | address_bits(to) | static_cast<uint64_t>(layout.bytes);
    visit_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      const auto* values =
          scale ? static_cast<const Accumulator<T>*>(scale->const_data_ptr()) : nullptr;
      const int64_t numel = layout.bytes / static_cast<int64_t>(sizeof(T));
      if (access_width(bits) == 16) {
        sum_rows<T, kWideValues<T>>(rows_of, slot, values, rows, ranks, numel, to, stream);
      } else {
        sum_rows<T, 1>(rows_of, slot, values, rows, ranks, numel, to, stream);
      }
    });
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("combine_rows", TORCH_BOX(&dynmm::combine_rows));
}
