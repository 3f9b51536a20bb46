// combine_rows: out[n] = sum_j weights[n, j] * row(inverse[n, j]), zero where there is no row.
#include <cstring>

#include "cpu/slots.h"

namespace dynmm {
namespace {

constexpr int64_t kBlock = 512;  // elements accumulated at a time, in the first-level cache

void move_rows(const Slots& slots, const int32_t* inverse, int64_t rows, int64_t bytes, char* out) {
  parallel_rows(rows, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const char* from = slots.row(inverse[n]);
      if (from != nullptr) {
        std::memcpy(out + n * bytes, from, static_cast<size_t>(bytes));
      } else {
        std::memset(out + n * bytes, 0, static_cast<size_t>(bytes));
      }
    }
  });
}

template <class T, class A>
void sum_rows(const Slots& slots, const int32_t* inverse, const A* weights, int64_t rows,
              int64_t ranks, int64_t numel, T* out) {
  const int64_t bytes = numel * static_cast<int64_t>(sizeof(T));
  parallel_rows(rows, bytes * ranks, [&](int64_t begin, int64_t end) {
    A sum[kBlock];
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t at = 0; at < numel; at += kBlock) {
        const int64_t size = std::min(kBlock, numel - at);
        std::fill(sum, sum + size, A{0});
        for (int64_t j = 0; j < ranks; ++j) {
          const char* from = slots.row(inverse[n * ranks + j]);
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

}  // namespace

Tensor combine_rows(std::vector<Tensor> outputs, std::vector<int64_t> starts, const Tensor& inverse,
                    std::optional<Tensor> weights) {
  const Tensor index = as_contiguous(inverse);
  const auto* slot = static_cast<const int32_t*>(index.const_data_ptr());
  const int64_t rows = inverse.size(0), ranks = inverse.size(1);
  const ScalarType dtype = outputs[0].scalar_type();
  const RowLayout layout(outputs[0]);
  const Slots slots(outputs, starts, layout);
  const Tensor out = empty_rows(outputs[0], rows, layout);
  if (ranks == 1 && !weights) {
    move_rows(slots, slot, rows, layout.bytes, static_cast<char*>(out.mutable_data_ptr()));
    return out;
  }
  const std::optional<Tensor> scale =
      weights ? std::optional(as_contiguous(*weights)) : std::nullopt;
  visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    sum_rows<T, A>(slots, slot, scale ? static_cast<const A*>(scale->const_data_ptr()) : nullptr,
                   rows, ranks, layout.numel * reals_per_element(dtype),
                   static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CPU, m) {
  m.impl("combine_rows", TORCH_BOX(&dynmm::combine_rows));
}
