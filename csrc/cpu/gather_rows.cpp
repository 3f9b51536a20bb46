// gather_rows on the CPU: one pass over all moves, in parts that run side by side.
#include "ops/gather_rows.h"

#include "cpu/copy_row.h"
#include "cpu/parallel.h"
#include "cpu/row_loops.h"

namespace dynmm {
namespace {

// nullptr: the entry names no row.
const char* row_of(const Move& move, uint32_t ranks, int64_t s) {
  const auto entry = static_cast<uint32_t>(move.entries[s]);
  if (entry >= move.limit) return nullptr;
  const int64_t row = ranks == 1 ? entry : entry / ranks;
  return move.from + row * move.from_stride;
}

// copy(from, to) for rows that are there, zeros for the others. A move of its own: no byte that is
// written can be one of it.
template <class F>
void for_rows(const Move move, uint32_t ranks, int64_t begin, int64_t end, const F& copy) {
  for (int64_t s = begin; s < end; ++s) {
    const char* from = row_of(move, ranks, s);
    char* to = move.to + s * move.bytes;
    if (from != nullptr) {
      copy(from, to);
    } else {
      std::memset(to, 0, static_cast<size_t>(move.bytes));
    }
  }
}

void copy_range(const Move& move, Runs runs, uint32_t ranks, int64_t begin, int64_t end) {
  const int64_t bytes = move.bytes / runs.count;
  if (bytes == 0) return;
  visit_size(bytes, [&](auto size) {
    if (runs.count == 1) {
      return for_rows(move, ranks, begin, end,
                      [=](const char* from, char* to) { copy_row(from, to, size); });
    }
    for_rows(move, ranks, begin, end, [=](const char* from, char* to) {
      for (int64_t run = 0; run < runs.count; ++run) {
        copy_row(from + run * runs.stride, to + run * bytes, size);
      }
    });
  });
}

struct Gather : OnCpu, TakesRuns {
  using OnCpu::OnCpu;

  void move(const std::vector<Move>& moves, const std::vector<Runs>& runs, uint32_t ranks) const {
    int64_t total = 0;
    for (const Move& move : moves) total += move.rows * move.bytes;
    const int64_t parts =
        std::clamp<int64_t>(total / kBytesPerThread, 1, torch::stable::get_num_threads());
    // Every part takes the same share of each move, so that it meets the same samples again; moves
    // of a few rows go round.
    const auto run_part = [&](int64_t part) {
      for (size_t i = 0; i < moves.size(); ++i) {
        const int64_t rows = moves[i].rows;
        const int64_t share = rows < parts ? (part + static_cast<int64_t>(i)) % parts : part;
        copy_range(moves[i], runs[i], ranks, rows * share / parts, rows * (share + 1) / parts);
      }
    };
    if (parts == 1) return run_part(0);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) run_part(part);
    });
  }

  template <class T>
  void scale(const Move& move, uint32_t ranks, const Accumulator<T>* weights) const {
    const int64_t numel = move.bytes / static_cast<int64_t>(sizeof(T));
    const auto scale_row = row_loops<T>().scale;
    parallel_rows(move.rows, move.bytes, [=](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const char* from = row_of(move, ranks, s);
        char* to = move.to + s * move.bytes;
        if (from == nullptr) {
          std::memset(to, 0, static_cast<size_t>(move.bytes));
        } else {
          scale_row(reinterpret_cast<const T*>(from), weights[move.entries[s]], numel,
                    reinterpret_cast<T*>(to));
        }
      }
    });
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&dynmm::gather_rows<dynmm::Gather>));
  m.impl("gather_rows.traced", TORCH_BOX(&dynmm::gather_rows<dynmm::Gather>));
}
