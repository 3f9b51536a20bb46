// gather_rows on a GPU: many tensors in one launch.
#include "cuda/launch.h"
#include "ops/gather_rows.h"

namespace dynmm {
namespace {

struct TiledMove : Move {
  int64_t first_block;
  Tiling tiling;
  int width;  // bytes per access
};

constexpr int kMostMoves = 30;  // 3 KB of kernel parameters

struct Moves {
  TiledMove move[kMostMoves];
  int count;
  uint32_t ranks;
};

__device__ const TiledMove& move_of(const Moves& moves) {
  int i = 0;
  while (i + 1 < moves.count && moves.move[i + 1].first_block <= blockIdx.x) ++i;
  return moves.move[i];
}

// All loads of a thread are issued before its first store. convert(value, entry): entry -1 where
// there is no row, and the value is zero.
template <class T, class Convert>
__device__ void move_tile(const TiledMove& move, uint32_t ranks, const Convert& convert) {
  T value[kUnroll];
  int32_t entry[kUnroll];
  int64_t row, unit;
  const auto block = static_cast<uint32_t>(blockIdx.x - move.first_block);
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (!locate(move.tiling, block, threadIdx.x + i * kThreads, move.rows, &row, &unit)) continue;
    const auto found = static_cast<uint32_t>(move.entries[row]);
    const int64_t source = ranks == 1 ? found : found / ranks;
    entry[i] = found < move.limit ? static_cast<int32_t>(found) : -1;
    value[i] = found < move.limit
                   ? reinterpret_cast<const T*>(move.from + source * move.from_stride)[unit]
                   : T{};
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (!locate(move.tiling, block, threadIdx.x + i * kThreads, move.rows, &row, &unit)) continue;
    reinterpret_cast<T*>(move.to + row * move.bytes)[unit] = convert(value[i], entry[i]);
  }
}

__global__ void __launch_bounds__(kThreads) gather_bytes(const __grid_constant__ Moves moves) {
  const TiledMove& move = move_of(moves);
  const auto same = [](const auto& value, int32_t) { return value; };
  switch (move.width) {
    case 16:
      return move_tile<Bytes16>(move, moves.ranks, same);
    case 8:
      return move_tile<uint64_t>(move, moves.ranks, same);
    case 4:
      return move_tile<uint32_t>(move, moves.ranks, same);
    case 2:
      return move_tile<uint16_t>(move, moves.ranks, same);
    default:
      return move_tile<uint8_t>(move, moves.ranks, same);
  }
}

template <class T, int kValues>
__global__ void __launch_bounds__(kThreads)
    gather_scaled(const __grid_constant__ Moves moves, const Accumulator<T>* weights) {
  using A = Accumulator<T>;
  move_tile<Unit<T, kValues>>(
      move_of(moves), moves.ranks, [weights](const Unit<T, kValues>& value, int32_t entry) {
        const A weight = entry < 0 ? A{0} : weights[entry];
        Unit<T, kValues> scaled;
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
          scaled.value[v] = static_cast<T>(weight * static_cast<A>(value.value[v]));
        }
        return scaled;
      });
}

// Collects moves and launches when the table is full.
class Launcher {
 public:
  explicit Launcher(uint32_t ranks) {
    moves_.ranks = ranks;
    moves_.count = 0;
  }

  // launch(grid, moves) is called with at least one block of work.
  template <class F>
  void add(const Move& move, int width, const F& launch) {
    if (move.rows == 0 || move.bytes == 0) return;
    const Tiling tiling(move.rows, move.bytes / width);
    moves_.move[moves_.count++] = {move, blocks_, tiling, width};
    blocks_ += tiling.blocks;
    if (moves_.count == kMostMoves) flush(launch);
  }

  template <class F>
  void flush(const F& launch) {
    if (moves_.count > 0) launch(static_cast<unsigned>(blocks_), moves_);
    moves_.count = 0;
    blocks_ = 0;
  }

 private:
  Moves moves_;
  int64_t blocks_ = 0;
};

uint64_t bits_of(const Move& move) {
  return address_bits(move.from) | address_bits(move.to) | static_cast<uint64_t>(move.bytes) |
         static_cast<uint64_t>(move.from_stride);
}

struct Gather : OnDevice {
  using OnDevice::OnDevice;

  void move(const std::vector<Move>& moves, uint32_t ranks) const {
    const auto launch = [on = stream()](unsigned grid, const Moves& table) {
      gather_bytes<<<grid, kThreads, 0, on>>>(table);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    Launcher launcher(ranks);
    for (const Move& move : moves) launcher.add(move, access_width(bits_of(move)), launch);
    launcher.flush(launch);
  }

  // One launch: 16-byte units where the addresses allow, single values elsewhere.
  template <class T>
  void scale(const Move& move, uint32_t ranks, const Accumulator<T>* weights) const {
    visit_values<T>(bits_of(move), [&](auto values) {
      constexpr int kValues = decltype(values)::value;
      const auto launch = [&](unsigned grid, const Moves& table) {
        gather_scaled<T, kValues><<<grid, kThreads, 0, stream()>>>(table, weights);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      };
      Launcher launcher(ranks);
      launcher.add(move, kValues * static_cast<int>(sizeof(T)), launch);
      launcher.flush(launch);
    });
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("gather_rows", TORCH_BOX(&dynmm::gather_rows<dynmm::Gather>));
  m.impl("gather_rows.traced", TORCH_BOX(&dynmm::gather_rows<dynmm::Gather>));
}
