// gather_rows: out_i[s] = sources[i][order[starts[i] + s] / ranks], many tensors in one call.
#include <cstring>

#include "cpu/parallel.h"

namespace dynmm {
namespace {

struct Move {
  const char* from;
  char* to;
  const int32_t* entries;
  int64_t rows, from_stride, bytes;
};

int64_t row_of(const Move& move, int64_t ranks, int64_t slot) {
  return ranks == 1 ? move.entries[slot] : move.entries[slot] / ranks;
}

template <int64_t kBytes>
void copy_small(const Move& move, int64_t ranks, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    std::memcpy(move.to + s * kBytes, move.from + row_of(move, ranks, s) * move.from_stride,
                kBytes);
  }
}

void copy_large(const Move& move, int64_t ranks, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    std::memcpy(move.to + s * move.bytes, move.from + row_of(move, ranks, s) * move.from_stride,
                static_cast<size_t>(move.bytes));
  }
}

void copy_range(const Move& move, int64_t ranks, int64_t begin, int64_t end) {
  switch (move.bytes) {
    case 1:
      return copy_small<1>(move, ranks, begin, end);
    case 4:
      return copy_small<4>(move, ranks, begin, end);
    case 8:
      return copy_small<8>(move, ranks, begin, end);
    case 16:
      return copy_small<16>(move, ranks, begin, end);
    case 32:
      return copy_small<32>(move, ranks, begin, end);
    case 64:
      return copy_small<64>(move, ranks, begin, end);
    default:
      return copy_large(move, ranks, begin, end);
  }
}

void move_all(const std::vector<Move>& moves, int64_t total, int64_t ranks) {
  const int64_t parts =
      std::clamp<int64_t>(total / kBytesPerThread, 1, torch::stable::get_num_threads());
  // Every part takes the same share of each move, so that it meets the same samples again; moves of
  // a few rows go round.
  const auto run_part = [&](int64_t part) {
    for (size_t i = 0; i < moves.size(); ++i) {
      const int64_t rows = moves[i].rows;
      const int64_t share = rows < parts ? (part + static_cast<int64_t>(i)) % parts : part;
      if (moves[i].bytes > 0) {
        copy_range(moves[i], ranks, rows * share / parts, rows * (share + 1) / parts);
      }
    }
  };
  if (parts == 1) return run_part(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) run_part(part);
  });
}

void scale_rows(const Move& move, ScalarType dtype, int64_t ranks, const Tensor& weights) {
  visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const auto* weight = static_cast<const A*>(weights.const_data_ptr());
    const int64_t numel = move.bytes / static_cast<int64_t>(sizeof(T));
    parallel_rows(move.rows, move.bytes, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t entry = move.entries[s];
        const A w = weight[entry];
        const auto* from = reinterpret_cast<const T*>(move.from + entry / ranks * move.from_stride);
        auto* to = reinterpret_cast<T*>(move.to + s * move.bytes);
        for (int64_t i = 0; i < numel; ++i) to[i] = static_cast<T>(w * static_cast<A>(from[i]));
      }
    });
  });
}

}  // namespace

std::vector<Tensor> gather_rows(std::vector<Tensor> sources, std::vector<int64_t> starts,
                                std::vector<int64_t> stops, const Tensor& order, int64_t ranks,
                                std::optional<Tensor> weights) {
  const Tensor entries = as_contiguous(order);
  const auto* entry = static_cast<const int32_t*>(entries.const_data_ptr());
  std::vector<Tensor> gathered;
  std::vector<Move> moves;
  gathered.reserve(sources.size());
  moves.reserve(sources.size());
  int64_t total = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const RowLayout layout(sources[i]);
    sources[i] = as_blocks(sources[i], layout);  // also keeps a copy alive until the move
    const int64_t rows = stops[i] - starts[i];
    gathered.push_back(empty_rows(sources[i], rows, layout));
    moves.push_back({static_cast<const char*>(sources[i].const_data_ptr()),
                     static_cast<char*>(gathered[i].mutable_data_ptr()), entry + starts[i], rows,
                     row_stride_bytes(sources[i]), layout.bytes});
    total += rows * layout.bytes;
  }
  if (!weights) {
    move_all(moves, total, ranks);
    return gathered;
  }
  const Tensor scale = as_contiguous(*weights);
  for (size_t i = 0; i < moves.size(); ++i) {
    scale_rows(moves[i], sources[i].scalar_type(), ranks, scale);
  }
  return gathered;
}

}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&dynmm::gather_rows));
}
