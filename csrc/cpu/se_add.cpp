// se_add: out = main_scale * main + aux_scale * aux on the first samples of a batch, main behind
// them; and the channel sums that its squeeze and its derivatives need.
//
// A run is what lies together: the pixels of a channel, or with channels last the channels of a
// pixel.
#include "ops/se_add.h"

#include <cstring>

#include "cpu/parallel.h"
#include "cpu/row_loops.h"

namespace dynmm {
namespace {

// Calls run(n, offset, factor, size): `size` elements of sample n from `offset` on; their factors
// are at `factor`, one each where channels come last, else one for all.
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

// sums[n, c] = scale * the sum over pixels of x, or where y is given of x * y.
template <class T, class A = Accumulator<T>>
void sum_channels(const MapLayout& layout, int64_t rows, double scale, const Maps<T>& x,
                  const Maps<T>* y, A* sums) {
  const int64_t channels = layout.channels, pixels = layout.pixels;
  const RowLoops<T> loops = row_loops<T>();
  const auto other = [y](int64_t n, int64_t offset) {
    return y != nullptr ? y->sample(n) + offset : nullptr;
  };
  if (!layout.last) {
    for_runs<T>(layout, rows, [&](int64_t n, int64_t offset, int64_t at, int64_t size) {
      const double sum = loops.sum_run(x.sample(n) + offset, other(n, offset), size);
      sums[at] = static_cast<A>(sum * scale);
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
      loops.sum_span(x.sample(n) + first, other(n, first), pixels, channels, size, sum);
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
    const auto add = row_loops<T>().scale_and_add[layout.last];
    for_runs<T>(layout, active, [&](int64_t n, int64_t offset, int64_t at, int64_t size) {
      const T *x = m.sample(n) + offset, *y = a.sample(n) + offset;
      add(x, y, s + at, t + at, size, to.sample(n) + offset);
    });
    copy_samples(m, active, rows, layout.numel(), to);
  }

  template <class T, class A = Accumulator<T>>
  void means(const MapLayout& layout, const Samples& maps, int64_t rows, const Tensor& out) const {
    sum_channels<T>(layout, rows, 1.0 / static_cast<double>(layout.pixels), maps.maps<T>(), nullptr,
                    static_cast<A*>(out.mutable_data_ptr()));
  }

  template <class T, class A = Accumulator<T>>
  void dots(const MapLayout& layout, const Samples& grad, const Samples& main, const Samples& aux,
            int64_t active, const Tensor& with_main, const Tensor& with_aux) const {
    const Maps<T> g = grad.maps<T>(), m = main.maps<T>(), a = aux.maps<T>();
    sum_channels<T>(layout, active, 1.0, g, &m, static_cast<A*>(with_main.mutable_data_ptr()));
    sum_channels<T>(layout, active, 1.0, g, &a, static_cast<A*>(with_aux.mutable_data_ptr()));
  }

  template <class T, class A = Accumulator<T>>
  void grads(const MapLayout& layout, const Samples& grad, const Tensor& main_scale,
             const Tensor& aux_scale, const Tensor& main_shift, const Tensor& aux_shift,
             int64_t rows, int64_t active, const Tensor& main, const Tensor& aux) const {
    const Maps<T> g = grad.maps<T>();
    const Maps<T> to_main = fresh_maps<T>(layout, main), to_aux = fresh_maps<T>(layout, aux);
    const auto *s = data_of<A>(main_scale), *t = data_of<A>(aux_scale);
    const auto *u = data_of<A>(main_shift), *v = data_of<A>(aux_shift);
    const auto shift = row_loops<T>().scale_and_shift[layout.last];
    for_runs<T>(layout, active, [&](int64_t n, int64_t offset, int64_t at, int64_t size) {
      const T* x = g.sample(n) + offset;
      shift(x, s + at, u + at, size, to_main.sample(n) + offset);
      shift(x, t + at, v + at, size, to_aux.sample(n) + offset);
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
