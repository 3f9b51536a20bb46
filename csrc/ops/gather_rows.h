#pragma once

#include "ops/refusals.h"
#include "rows.h"

namespace dynmm {

// Rows of one source: to[s] = from[entries[s] / ranks]; zeros where the entry is not in [0, limit).
struct Move {
  const char* from;
  char* to;
  const int32_t* entries;
  int64_t rows, from_stride, bytes;
  uint32_t limit;  // at most 2^31, so that one unsigned comparison finds what is outside
};

// A backend that takes rows of several runs. For others they are copied into one.
struct TakesRuns {};

// gather_rows: out_i[s] = sources[i][order[starts[i] + s] / ranks], times weights[order[...]] where
// they are given; zeros for an entry of `order` that names no row or no weight.
//
// Backend: move(moves, ranks), or move(moves, runs, ranks) where it TakesRuns, and scale<T>(move,
// ranks, weights).
template <class Backend>
std::vector<Tensor> gather_rows(std::vector<Tensor> sources, std::vector<int64_t> starts,
                                std::vector<int64_t> stops, const Tensor& order, int64_t ranks,
                                std::optional<Tensor> weights) {
  const char* op = "gather_rows";
  const Operand index(order);
  const std::vector<Operand> from(sources.begin(), sources.end());
  const std::optional<Operand> scale = weights ? std::optional<Operand>(*weights) : std::nullopt;
  for (const Operand& source : from) check_device(op, source, "order", index.device);
  if (scale) check_device(op, *scale, "order", index.device);
  if (index.dtype != ScalarType::Int || index.dims() != 1) {
    refuse(op, ": order must be int32 [E]; got ", told(index));
  }
  if (starts.size() != from.size() || stops.size() != from.size()) {
    refuse(op, ": wanted one start and one stop per source, ", from.size(), "; got ", starts.size(),
           " and ", stops.size());
  }
  if (ranks < 1) refuse(op, ": ranks must be at least 1; got ", ranks);
  const int64_t entries = index.rows();
  for (size_t i = 0; i < from.size(); ++i) {
    if (from[i].dims() < 1) refuse(op, ": source ", i, " must be [N, ...]; got ", told(from[i]));
    if (starts[i] < 0 || starts[i] > stops[i] || stops[i] > entries) {
      refuse(op, ": wanted 0 <= start <= stop <= ", entries, ", the entries of order; got ",
             starts[i], " and ", stops[i], " for source ", i);
    }
    if (scale) check_weights(op, "source", i, from[i], *scale, entries, "order");
  }

  const Backend backend(index.device);
  const Tensor contiguous = as_contiguous(index);
  const auto* entry = data_of<int32_t>(contiguous);
  Copies copies(weights.has_value());
  std::vector<Tensor> gathered;
  std::vector<Move> moves;
  std::vector<Runs> runs;
  const bool in_runs = std::is_base_of_v<TakesRuns, Backend> && !weights;
  gathered.reserve(from.size());
  moves.reserve(from.size());
  // Entries are int32: further ranks than 2^31 change nothing.
  constexpr int64_t most = int64_t{1} << 31;
  ranks = std::min(ranks, most);
  for (size_t i = 0; i < from.size(); ++i) {
    const RowLayout layout(from[i]);
    const std::optional<Runs> found = in_runs ? runs_of(from[i], layout) : std::nullopt;
    if (in_runs) runs.push_back(found.value_or(Runs{}));
    const Blocks blocks = found ? blocks_at(from[i]) : copies.blocks_of(from[i], layout);
    const int64_t rows = stops[i] - starts[i];
    const int64_t limit =
        std::min({std::min(from[i].rows(), most) * ranks, most, scale ? entries : most});
    gathered.push_back(empty_rows(from[i], rows, layout.strides.data()));
    moves.push_back({blocks.base, static_cast<char*>(gathered[i].mutable_data_ptr()),
                     entry + starts[i], rows, blocks.stride, layout.bytes,
                     static_cast<uint32_t>(limit)});
  }
  if (!weights) {
    if constexpr (std::is_base_of_v<TakesRuns, Backend>) {
      backend.move(moves, runs, static_cast<uint32_t>(ranks));
    } else {
      backend.move(moves, static_cast<uint32_t>(ranks));
    }
    return gathered;
  }
  const Tensor factors = as_contiguous(*scale);
  for (size_t i = 0; i < moves.size(); ++i) {
    if (moves[i].bytes == 0) continue;
    visit_weighted(from[i].dtype, [&](auto zero) {
      using T = decltype(zero);
      backend.template scale<T>(moves[i], static_cast<uint32_t>(ranks),
                                data_of<Accumulator<T>>(factors));
    });
  }
  return gathered;
}

}  // namespace dynmm
