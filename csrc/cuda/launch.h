#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "common.h"

namespace dynmm {

// The device of a tensor, made current for as long as this lives, and its current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : device_(index_of(t)), guard_(device_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  static int32_t index_of(const Tensor& t) {
    int32_t index = 0;
    check(aoti_torch_get_device_index(t.get(), &index));
    return index;
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// N values of T in one access. Kernels move rows as such units.
template <class T, int kValues>
struct alignas(sizeof(T) * kValues) Unit {
  T value[kValues];
};

using Bytes16 = Unit<uint64_t, 2>;

// Values of T in a 16-byte access; integers, whose sums are rare, go one by one.
template <class T>
constexpr int kWideValues = std::is_integral_v<T> ? 1 : 16 / static_cast<int>(sizeof(T));

// The widest access, 16, 8, 4, 2 or 1 bytes, to which everything in `bits` is aligned.
inline int access_width(uint64_t bits) {
  const uint64_t lowest = (bits | 16) & (~(bits | 16) + 1);
  return static_cast<int>(lowest);
}

inline uint64_t address_bits(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

// A block of kThreads works on a tile of up to kPieces units: each thread has kUnroll loads in
// flight. Units of one row that exceeds a tile are split over several blocks.
constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kPieces = kThreads * kUnroll;

struct Tiling {
  int32_t columns;    // units of a row that one tile holds
  int32_t tile_rows;  // rows that one tile holds
  int32_t row_tiles;  // tiles along a row
  int64_t units;      // units in a whole row
  int64_t blocks;

  Tiling() = default;
  Tiling(int64_t rows, int64_t units_per_row) : units(units_per_row) {
    columns = static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(units, 1), kPieces));
    tile_rows = kPieces / columns;
    row_tiles = static_cast<int32_t>(ceil_div<int64_t>(units, columns));
    blocks = ceil_div<int64_t>(rows, tile_rows) * row_tiles;
  }
};

// Where piece `q` of tile `block` lies: the row, and the unit within the row; false: outside.
__device__ inline bool locate(const Tiling& tiling, int64_t block, int q, int64_t rows,
                              int64_t* row, int64_t* unit) {
  const int64_t row_tile = block / tiling.row_tiles;
  const int64_t column_tile = block - row_tile * tiling.row_tiles;
  const uint32_t local = static_cast<uint32_t>(q) / static_cast<uint32_t>(tiling.columns);
  *row = row_tile * tiling.tile_rows + local;
  *unit = column_tile * tiling.columns + (q - static_cast<int64_t>(local) * tiling.columns);
  return local < static_cast<uint32_t>(tiling.tile_rows) && *row < rows && *unit < tiling.units;
}

}  // namespace dynmm
