// gather_rows: out_i[s] = sources[i][order[starts[i] + s] / ranks], many tensors in one launch.
#include "cuda/launch.h"

namespace dynmm {
namespace {

struct Move {
  const char* from;
  char* to;
  const int32_t* entries;
  int64_t rows, from_stride, bytes;
  int64_t first_block;
  Tiling tiling;
  int width;  // bytes per access
};

constexpr int kMostMoves = 30;  // 3 KB of kernel parameters

struct Moves {
  Move move[kMostMoves];
  int count;
  int ranks;
};

__device__ const Move& move_of(const Moves& moves) {
  int i = 0;
  while (i + 1 < moves.count && moves.move[i + 1].first_block <= blockIdx.x) ++i;
  return moves.move[i];
}

// All loads of a thread are issued before its first store.
template <class T, class Convert>
__device__ void move_tile(const Move& move, int ranks, const Convert& convert) {
  T value[kUnroll];
  int32_t entry[kUnroll];
  int64_t row, unit;
  const int64_t block = blockIdx.x - move.first_block;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (!locate(move.tiling, block, threadIdx.x + i * kThreads, move.rows, &row, &unit)) continue;
    entry[i] = move.entries[row];
    const int64_t source = ranks == 1 ? entry[i] : entry[i] / ranks;
    value[i] = reinterpret_cast<const T*>(move.from + source * move.from_stride)[unit];
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (!locate(move.tiling, block, threadIdx.x + i * kThreads, move.rows, &row, &unit)) continue;
    reinterpret_cast<T*>(move.to + row * move.bytes)[unit] = convert(value[i], entry[i]);
  }
}

__global__ void __launch_bounds__(kThreads) gather_bytes(const __grid_constant__ Moves moves) {
  const Move& move = move_of(moves);
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
        const A weight = weights[entry];
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
  Launcher(int64_t ranks, cudaStream_t stream) : stream_(stream) {
    moves_.ranks = static_cast<int>(ranks);
    moves_.count = 0;
  }

  // launch(grid, moves) is called with at least one block of work.
  template <class F>
  void add(Move move, const F& launch) {
    if (move.rows == 0 || move.bytes == 0) return;
    move.tiling = Tiling(move.rows, move.bytes / move.width);
    move.first_block = blocks_;
    moves_.move[moves_.count++] = move;
    blocks_ += move.tiling.blocks;
    if (moves_.count == kMostMoves) flush(launch);
  }

  template <class F>
  void flush(const F& launch) {
    if (moves_.count > 0) launch(static_cast<unsigned>(blocks_), moves_, stream_);
    moves_.count = 0;
    blocks_ = 0;
  }

 private:
  Moves moves_;
  int64_t blocks_ = 0;
  cudaStream_t stream_;
};

int width_of(const Move& move) {
  uint64_t bits =
      address_bits(move.from) | address_bits(move.to) | static_cast<uint64_t>(move.bytes);
  return access_width(bits | static_cast<uint64_t>(move.from_stride));
}

void launch_bytes(unsigned grid, const Moves& moves, cudaStream_t stream) {
  gather_bytes<<<grid, kThreads, 0, stream>>>(moves);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// One launch: 16-byte units where the addresses allow, single values elsewhere.
void launch_scaled(Move move, ScalarType dtype, int64_t ranks, const void* weights,
                   cudaStream_t stream) {
  visit_floating(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const auto* scale = static_cast<const A*>(weights);
    const bool wide = move.width == 16;
    if (!wide) move.width = sizeof(T);
    const auto launch = [&](unsigned grid, const Moves& moves, cudaStream_t on) {
      if (wide) {
        gather_scaled<T, kWideValues<T>><<<grid, kThreads, 0, on>>>(moves, scale);
      } else {
        gather_scaled<T, 1><<<grid, kThreads, 0, on>>>(moves, scale);
      }
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    Launcher launcher(ranks, stream);
    launcher.add(move, launch);
    launcher.flush(launch);
  });
}

}  // namespace

std::vector<Tensor> gather_rows(std::vector<Tensor> sources, std::vector<int64_t> starts,
                                std::vector<int64_t> stops, const Tensor& order, int64_t ranks,
                                std::optional<Tensor> weights) {
  const OnDeviceOf device(order);
  const cudaStream_t stream = device.stream();
  const Tensor entries = as_contiguous(order);
  const auto* entry = static_cast<const int32_t*>(entries.const_data_ptr());
  const std::optional<Tensor> scale =
      weights ? std::optional(as_contiguous(*weights)) : std::nullopt;
  std::vector<Tensor> gathered;
  gathered.reserve(sources.size());
  Launcher launcher(ranks, stream);
  for (size_t i = 0; i < sources.size(); ++i) {
    const RowLayout layout(sources[i]);
    sources[i] = as_blocks(sources[i], layout);  // also keeps a copy alive until the launch
    const int64_t rows = stops[i] - starts[i];
    gathered.push_back(empty_rows(sources[i], rows, layout));
    Move move{static_cast<const char*>(sources[i].const_data_ptr()),
              static_cast<char*>(gathered[i].mutable_data_ptr()),
              entry + starts[i],
              rows,
              row_stride_bytes(sources[i]),
              layout.bytes};
    move.width = width_of(move);
    if (scale) {
      launch_scaled(move, sources[i].scalar_type(), ranks, scale->const_data_ptr(), stream);
    } else {
      launcher.add(move, launch_bytes);
    }
  }
  launcher.flush(launch_bytes);
  return gathered;
}

}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("gather_rows", TORCH_BOX(&dynmm::gather_rows));
}
