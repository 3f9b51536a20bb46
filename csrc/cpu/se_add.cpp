// se_add: out = main_scale * main + aux_scale * aux on the first samples of a batch, main behind
// them; and the channel sums that its squeeze and its derivatives need.
//
// A run is what lies together: the pixels of a channel, or with channels last the channels of a
// pixel. Short sums go to a double in an order that never changes.
#include "ops/se_add.h"

#include <cstring>

#include "cpu/parallel.h"

namespace dynmm {
namespace {

constexpr int64_t kSpan = 256;  // channels that one thread sums at a time where they come last
constexpr int64_t kShort = 16;  // terms added up before they go to a double
constexpr int64_t kLanes = 16;

// Calls run(n, offset, factor, size): `size` elements of sample n from `offset` on; the factors of
// element i are at factor + i * kStep, kStep being 1 where channels come last, else 0.
template <class T, class F>
void for_runs(const MapLayout& layout, int64_t rows, const F& run) {
  const int64_t runs = layout.last ? layout.pixels : layout.channels;
  const int64_t size = layout.last ? layout.channels : layout.pixels;
  parallel_rows(rows * runs, size * static_cast<int64_t>(sizeof(T)), [&](auto begin, auto end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / runs, within = r - n * runs;
      run(n, within * size, n * layout.channels + (layout.last ? 0 : within), size);
    }
  });
}

template <int64_t kStep, class T, class A>
void scale_and_add(const T* main, const T* aux, const A* s, const A* t, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] = static_cast<T>(s[i * kStep] * static_cast<A>(main[i]) +
                            t[i * kStep] * static_cast<A>(aux[i]));
  }
}

template <int64_t kStep, class T, class A>
void scale_and_shift(const T* grad, const A* scale, const A* shift, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] = static_cast<T>(scale[i * kStep] * static_cast<A>(grad[i]) + shift[i * kStep]);
  }
}

template <class T>
void copy_samples(const Maps<T>& from, int64_t begin, int64_t end, int64_t numel,
                  const Maps<T>& to) {
  const int64_t bytes = numel * static_cast<int64_t>(sizeof(T));
  parallel_rows(end - begin, bytes, [&](int64_t first, int64_t stop) {
    for (int64_t n = begin + first; n < begin + stop; ++n) {
      std::memcpy(to.sample(n), from.sample(n), static_cast<size_t>(bytes));
    }
  });
}

template <class T>
Maps<T> fresh_maps(const MapLayout& layout, const Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), layout.numel()};
}

// Four terms at a time: the compiler then keeps up with memory.
template <class F>
auto four(const F& term, int64_t at, int64_t step) {
  return (term(at) + term(at + step)) + (term(at + 2 * step) + term(at + 3 * step));
}

// The sum of term(0..size), short sums at a time.
template <class A, class F>
double sum_run(const F& term, int64_t size) {
  double sum = 0;
  int64_t i = 0;
  while (i + 4 * kLanes <= size) {
    A lane[kLanes] = {};
    const int64_t stop = std::min(i + kShort * kLanes, size);
    for (; i + 4 * kLanes <= stop; i += 4 * kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) lane[l] += four(term, i + l, kLanes);
    }
    for (int64_t l = 0; l < kLanes; ++l) sum += static_cast<double>(lane[l]);
  }
  for (; i < size; ++i) sum += static_cast<double>(term(i));
  return sum;
}

// sum[c] = the sum of term(p * channels + c) over the pixels p, for `size` channels.
template <class A, class F>
void sum_span(const F& term, int64_t pixels, int64_t channels, int64_t size, double* sum) {
  std::fill(sum, sum + size, 0.0);
  int64_t p = 0;
  while (p + 4 <= pixels) {
    A part[kSpan] = {};
    const int64_t stop = std::min(p + kShort, pixels);
    for (; p + 4 <= stop; p += 4) {
      for (int64_t c = 0; c < size; ++c) part[c] += four(term, p * channels + c, channels);
    }
    for (int64_t c = 0; c < size; ++c) sum[c] += static_cast<double>(part[c]);
  }
  for (; p < pixels; ++p) {
    for (int64_t c = 0; c < size; ++c) sum[c] += static_cast<double>(term(p * channels + c));
  }
}

// sums[n, c] = scale * the sum over pixels; terms(n, offset) are those of sample n from there on.
template <class T, class A, class F>
void sum_channels(const MapLayout& layout, int64_t rows, double scale, const F& terms, A* sums) {
  const int64_t channels = layout.channels, pixels = layout.pixels;
  if (!layout.last) {
    for_runs<T>(layout, rows, [&](int64_t n, int64_t offset, int64_t at, int64_t size) {
      sums[at] = static_cast<A>(sum_run<A>(terms(n, offset), size) * scale);
    });
    return;
  }
  const int64_t spans = (channels + kSpan - 1) / kSpan;
  const int64_t bytes = pixels * kSpan * static_cast<int64_t>(sizeof(T));
  parallel_rows(rows * spans, bytes, [&](int64_t begin, int64_t end) {
    double sum[kSpan];
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / spans, first = (r - n * spans) * kSpan;
      const int64_t size = std::min(kSpan, channels - first);
      sum_span<A>(terms(n, first), pixels, channels, size, sum);
      A* to = sums + n * channels + first;
      for (int64_t c = 0; c < size; ++c) to[c] = static_cast<A>(sum[c] * scale);
    }
  });
}

struct SeAdd : OnCpu {
  using OnCpu::OnCpu;

  template <class T, class A = Accumulator<T>>
  void add(const MapLayout& layout, const Samples& main, const Samples& aux,
           const Tensor& main_scale, const Tensor& aux_scale, int64_t rows, int64_t active,
           const Tensor& out) const {
    const Maps<T> m = main.maps<T>(), a = aux.maps<T>(), to = fresh_maps<T>(layout, out);
    const auto *s = data_of<A>(main_scale), *t = data_of<A>(aux_scale);
    for_runs<T>(layout, active, [&](int64_t n, int64_t offset, int64_t at, int64_t size) {
      const T *x = m.sample(n) + offset, *y = a.sample(n) + offset;
      T* z = to.sample(n) + offset;
      if (layout.last) {
        scale_and_add<1>(x, y, s + at, t + at, size, z);
      } else {
        scale_and_add<0>(x, y, s + at, t + at, size, z);
      }
    });
    copy_samples(m, active, rows, layout.numel(), to);
  }

  template <class T, class A = Accumulator<T>>
  void means(const MapLayout& layout, const Samples& maps, int64_t rows, const Tensor& out) const {
    const auto values = [m = maps.maps<T>()](int64_t n, int64_t offset) {
      return [x = m.sample(n) + offset](int64_t i) { return static_cast<A>(x[i]); };
    };
    sum_channels<T, A>(layout, rows, 1.0 / static_cast<double>(layout.pixels), values,
                       static_cast<A*>(out.mutable_data_ptr()));
  }

  template <class T, class A = Accumulator<T>>
  void dots(const MapLayout& layout, const Samples& grad, const Samples& main, const Samples& aux,
            int64_t active, const Tensor& with_main, const Tensor& with_aux) const {
    const auto product = [g = grad.maps<T>()](const Maps<T>& other) {
      return [g, other](int64_t n, int64_t offset) {
        return [x = g.sample(n) + offset, y = other.sample(n) + offset](int64_t i) {
          return static_cast<A>(x[i]) * static_cast<A>(y[i]);
        };
      };
    };
    sum_channels<T, A>(layout, active, 1.0, product(main.maps<T>()),
                       static_cast<A*>(with_main.mutable_data_ptr()));
    sum_channels<T, A>(layout, active, 1.0, product(aux.maps<T>()),
                       static_cast<A*>(with_aux.mutable_data_ptr()));
  }

  template <class T, class A = Accumulator<T>>
  void grads(const MapLayout& layout, const Samples& grad, const Tensor& main_scale,
             const Tensor& aux_scale, const Tensor& main_shift, const Tensor& aux_shift,
             int64_t rows, int64_t active, const Tensor& main, const Tensor& aux) const {
    const Maps<T> g = grad.maps<T>();
    const Maps<T> to_main = fresh_maps<T>(layout, main), to_aux = fresh_maps<T>(layout, aux);
    const auto *s = data_of<A>(main_scale), *t = data_of<A>(aux_scale);
    const auto *u = data_of<A>(main_shift), *v = data_of<A>(aux_shift);
    for_runs<T>(layout, active, [&](int64_t n, int64_t offset, int64_t at, int64_t size) {
      const T* x = g.sample(n) + offset;
      T *y = to_main.sample(n) + offset, *z = to_aux.sample(n) + offset;
      if (layout.last) {
        scale_and_shift<1>(x, s + at, u + at, size, y);
        scale_and_shift<1>(x, t + at, v + at, size, z);
      } else {
        scale_and_shift<0>(x, s + at, u + at, size, y);
        scale_and_shift<0>(x, t + at, v + at, size, z);
      }
    });
    copy_samples(g, active, rows, layout.numel(), to_main);
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CPU, m) {
  m.impl("se_add", TORCH_BOX(&dynmm::se_add<dynmm::SeAdd>));
  m.impl("se_add_means", TORCH_BOX(&dynmm::se_add_means<dynmm::SeAdd>));
  m.impl("se_add_dots", TORCH_BOX(&dynmm::se_add_dots<dynmm::SeAdd>));
  m.impl("se_add_grads", TORCH_BOX(&dynmm::se_add_grads<dynmm::SeAdd>));
}
