// combine_rows on the CPU: rows are moved whole, or summed.
#include "ops/combine_rows.h"

#include "cpu/copy_row.h"
#include "cpu/row_loops.h"
#include "cpu/slots.h"

namespace dynmm {
namespace {

constexpr int64_t kBlock = 512;  // integers summed at a time, in the first-level cache

// Integers, which have no weights.
template <class T>
void sum_integers(const Term<T>* terms, int64_t count, int64_t numel, T* out) {
  Accumulator<T> sum[kBlock];
  for (int64_t at = 0; at < numel; at += kBlock) {
    const int64_t size = std::min(kBlock, numel - at);
    std::fill(sum, sum + size, 0);
    for (int64_t j = 0; j < count; ++j) {
      const T* term = terms[j].row + at;
      for (int64_t i = 0; i < size; ++i) sum[i] += static_cast<Accumulator<T>>(term[i]);
    }
    for (int64_t i = 0; i < size; ++i) out[at + i] = static_cast<T>(sum[i]);
  }
}

template <class T>
auto loop_over_terms() {
  if constexpr (std::is_integral_v<T>) {
    return &sum_integers<T>;
  } else {
    return row_loops<T>().sum_terms;
  }
}

struct Combine : OnCpu {
  using OnCpu::OnCpu;

  void move(const Slots& slots, const int32_t* inverse, int64_t rows, int64_t bytes,
            char* out) const {
    visit_size(bytes, [=, &slots](auto size) {
      parallel_rows(rows, bytes, [=, &slots](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          const char* from = row_of(slots, inverse[n]);
          char* to = out + n * bytes;
          if (from != nullptr) {
            copy_row(from, to, size);
          } else {
            std::memset(to, 0, static_cast<size_t>(bytes));
          }
        }
      });
    });
  }

  template <class T, class A = Accumulator<T>>
  void sum(const Slots& slots, const int32_t* inverse, const A* weights, int64_t rows,
           int64_t ranks, int64_t numel, T* out) const {
    const auto sum_terms = loop_over_terms<T>();
    const int64_t bytes = numel * static_cast<int64_t>(sizeof(T));
    parallel_rows(rows, bytes * ranks, [=, &slots](int64_t begin, int64_t end) {
      std::vector<Term<T>> room(static_cast<size_t>(ranks));
      Term<T>* const terms = room.data();
      for (int64_t n = begin; n < end; ++n) {
        int64_t count = 0;
        for (int64_t e = n * ranks; e < (n + 1) * ranks; ++e) {
          const auto* row = reinterpret_cast<const T*>(row_of(slots, inverse[e]));
          if (row != nullptr) terms[count++] = {row, weights != nullptr ? weights[e] : A{1}};
        }
        sum_terms(terms, count, numel, out + n * numel);
      }
    });
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CPU, m) {
  m.impl("combine_rows", TORCH_BOX(&dynmm::combine_rows<dynmm::Combine>));
  m.impl("combine_rows.traced", TORCH_BOX(&dynmm::combine_rows<dynmm::Combine>));
}
