// gather_rows on the CPU: one pass over all moves, in parts that run side by side.
#include "ops/gather_rows.h"

#include <cstring>

#include "cpu/parallel.h"

namespace dynmm {
namespace {

// nullptr: the entry names no row.
const char* row_of(const Move& move, uint32_t ranks, int64_t s) {
  const auto entry = static_cast<uint32_t>(move.entries[s]);
  if (entry >= move.limit) return nullptr;
  const int64_t row = ranks == 1 ? entry : entry / ranks;
  return move.from + row * move.from_stride;
}

// kBytes: of a row, where they are few; 0 where they are many.
template <int64_t kBytes>
void copy_rows(const Move& move, uint32_t ranks, int64_t begin, int64_t end) {
  const auto bytes = static_cast<size_t>(kBytes > 0 ? kBytes : move.bytes);
  for (int64_t s = begin; s < end; ++s) {
    const char* from = row_of(move, ranks, s);
    char* to = move.to + static_cast<size_t>(s) * bytes;
    if (from != nullptr) {
      std::memcpy(to, from, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
  }
}

void copy_range(const Move& move, uint32_t ranks, int64_t begin, int64_t end) {
  switch (move.bytes) {
    case 0:
      return;
    case 1:
      return copy_rows<1>(move, ranks, begin, end);
    case 4:
      return copy_rows<4>(move, ranks, begin, end);
    case 8:
      return copy_rows<8>(move, ranks, begin, end);
    case 16:
      return copy_rows<16>(move, ranks, begin, end);
    case 32:
      return copy_rows<32>(move, ranks, begin, end);
    case 64:
      return copy_rows<64>(move, ranks, begin, end);
    default:
      return copy_rows<0>(move, ranks, begin, end);
  }
}

template <class T>
void scale_row(const T* from, Accumulator<T> weight, int64_t numel, T* __restrict__ to) {
  for (int64_t i = 0; i < numel; ++i) {
    to[i] = static_cast<T>(weight * static_cast<Accumulator<T>>(from[i]));
  }
}

struct Gather : OnCpu {
  using OnCpu::OnCpu;

  void move(const std::vector<Move>& moves, uint32_t ranks) const {
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
        copy_range(moves[i], ranks, rows * share / parts, rows * (share + 1) / parts);
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
