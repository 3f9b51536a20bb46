#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "rows.h"

namespace dynmm {

// What a backend on a GPU begins with: its device is current for as long as this lives.
class OnDevice {
 public:
  const Device device;

  explicit OnDevice(Device device) : device(device), guard_(device.index) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device.index, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
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

// Calls f(T{}), T being what moves as many bytes as `bits` allow.
template <class F>
void visit_width(uint64_t bits, const F& f) {
  switch (access_width(bits)) {
    case 16:
      return f(Bytes16{});
    case 8:
      return f(uint64_t{});
    case 4:
      return f(uint32_t{});
    case 2:
      return f(uint16_t{});
    default:
      return f(uint8_t{});
  }
}

// Calls f(values of T per access), as a type: many where `bits` allow 16 bytes, else one.
template <class T, class F>
void visit_values(uint64_t bits, const F& f) {
  if (access_width(bits) == 16) {
    f(std::integral_constant<int, kWideValues<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

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
template <class Index>
__device__ bool locate(const Tiling& tiling, uint32_t block, int q, int64_t rows, int64_t* row,
                       Index* unit) {
  const auto row_tiles = static_cast<uint32_t>(tiling.row_tiles);
  const auto columns = static_cast<uint32_t>(tiling.columns);
  const uint32_t row_tile = block / row_tiles, column_tile = block - row_tile * row_tiles;
  const uint32_t local = static_cast<uint32_t>(q) / columns;
  *row = static_cast<int64_t>(row_tile) * tiling.tile_rows + local;
  *unit = static_cast<Index>(column_tile) * columns + (q - local * columns);
  return local < static_cast<uint32_t>(tiling.tile_rows) && *row < rows &&
         *unit < static_cast<Index>(tiling.units);
}

}  // namespace dynmm
