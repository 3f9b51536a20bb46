// combine_rows on the CPU: rows are moved whole, or summed a block of elements at a time.
#include "ops/combine_rows.h"

#include <cstring>

#include "cpu/slots.h"

namespace dynmm {
namespace {

constexpr int64_t kBlock = 512;  // elements accumulated at a time, in the first-level cache

struct Combine : OnCpu {
  using OnCpu::OnCpu;

  void move(const Slots& slots, const int32_t* inverse, int64_t rows, int64_t bytes,
            char* out) const {
    parallel_rows(rows, bytes, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const char* from = row_of(slots, inverse[n]);
        if (from != nullptr) {
          std::memcpy(out + n * bytes, from, static_cast<size_t>(bytes));
        } else {
          std::memset(out + n * bytes, 0, static_cast<size_t>(bytes));
        }
      }
    });
  }

  template <class T, class A = Accumulator<T>>
  void sum(const Slots& slots, const int32_t* inverse, const A* weights, int64_t rows,
           int64_t ranks, int64_t numel, T* out) const {
    const int64_t bytes = numel * static_cast<int64_t>(sizeof(T));
    parallel_rows(rows, bytes * ranks, [&](int64_t begin, int64_t end) {
      A sum[kBlock];
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t at = 0; at < numel; at += kBlock) {
          const int64_t size = std::min(kBlock, numel - at);
          std::fill(sum, sum + size, A{0});
          for (int64_t j = 0; j < ranks; ++j) {
            const char* from = row_of(slots, inverse[n * ranks + j]);
            if (from == nullptr) continue;
            const T* term = reinterpret_cast<const T*>(from) + at;
            if (weights == nullptr) {
              for (int64_t i = 0; i < size; ++i) sum[i] += static_cast<A>(term[i]);
            } else {
              const A w = weights[n * ranks + j];
              for (int64_t i = 0; i < size; ++i) sum[i] += w * static_cast<A>(term[i]);
            }
          }
          T* to = out + n * numel + at;
          for (int64_t i = 0; i < size; ++i) to[i] = static_cast<T>(sum[i]);
        }
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
