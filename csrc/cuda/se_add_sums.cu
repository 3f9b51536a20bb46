// se_add_means and se_add_dots on a GPU. Sums are taken in an order that never changes.
#include "cuda/reduce.h"
#include "cuda/samples.h"
#include "ops/se_add.h"

namespace dynmm {
namespace {

constexpr int64_t kSteps = 16;  // units that one thread takes before more threads are asked for

// A column of kLanes threads sums one channel of a sample, or with channels last the kOut channels
// that one unit holds. Block (b, p) writes part p of [parts, columns * kOut], times `scale`: to
// `first` the sums of maps, or if kDots those of its products with main, and with aux to `second`.
template <class T, int kValues, bool kLast, bool kDots, int kLanes, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads)
    channel_sums(Maps<T> maps, Maps<T> main, Maps<T> aux, int64_t columns, int64_t channels,
                 int64_t pixels, A scale, A* first, A* second) {
  constexpr int kColumns = kThreads / kLanes, kOut = kLast ? kValues : 1, kSums = kDots ? 2 : 1;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = kLast ? thread / kColumns : thread % kLanes;
  const int own = kLast ? thread % kColumns : thread / kLanes;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + own;
  const int64_t n = column * kOut / channels, channel = column * kOut - n * channels;
  const int64_t begin = channel * pixels;
  const int64_t stop = kLast ? pixels : (begin + pixels + kValues - 1) / kValues;
  int64_t i = (kLast ? 0 : begin / kValues) + static_cast<int64_t>(blockIdx.y) * kLanes + lane;
  A sum[kSums][kOut] = {};
#pragma unroll 2
  for (; column < columns && i < stop; i += static_cast<int64_t>(gridDim.y) * kLanes) {
    const int64_t at = kLast ? i * channels + channel : i * kValues;
    Unit<T, kValues> x = unit_of<kValues>(maps, n, at), y, z;
    if constexpr (kDots) y = unit_of<kValues>(main, n, at);
    if constexpr (kDots) z = unit_of<kValues>(aux, n, at);
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      if (!kLast && (at + v < begin || at + v >= begin + pixels)) continue;
      const A value = static_cast<A>(x.value[v]);
      sum[0][v % kOut] += kDots ? value * static_cast<A>(y.value[v]) : value;
      if constexpr (kDots) sum[1][v % kOut] += value * static_cast<A>(z.value[v]);
    }
  }
  __shared__ A shared[kOut][kLanes][kColumns];
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    if (k > 0) __syncthreads();
    for (int v = 0; v < kOut; ++v) shared[v][lane][own] = sum[k][v];
    for (int step = kLanes / 2; step > 0; step /= 2) {
      __syncthreads();
      if (lane >= step) continue;
      for (int v = 0; v < kOut; ++v) shared[v][lane][own] += shared[v][lane + step][own];
    }
    if (lane > 0 || column >= columns) continue;
    A* to = (k == 0 ? first : second) + (blockIdx.y * columns + column) * kOut;
    for (int v = 0; v < kOut; ++v) to[v] = shared[v][0][own] * scale;
  }
}

struct Sums : OnDevice {
  using OnDevice::OnDevice;

  template <class T>
  void means(const MapLayout& layout, const Samples& maps, int64_t rows, const Tensor& out) const {
    sum_channels<T, false>(layout, maps, maps, maps, rows * layout.channels, out, out);
  }

  template <class T>
  void dots(const MapLayout& layout, const Samples& grad, const Samples& main, const Samples& aux,
            int64_t active, const Tensor& with_main, const Tensor& with_aux) const {
    sum_channels<T, true>(layout, grad, main, aux, active * layout.channels, with_main, with_aux);
  }

 private:
  template <class T, bool kDots, class A = Accumulator<T>>
  void sum_channels(const MapLayout& layout, const Samples& maps, const Samples& main,
                    const Samples& aux, int64_t entries, const Tensor& of_main,
                    const Tensor& of_aux) const {
    if (entries == 0) return;
    auto* first = static_cast<A*>(of_main.mutable_data_ptr());
    auto* second = static_cast<A*>(of_aux.mutable_data_ptr());
    const A scale = kDots ? A{1} : A{1} / static_cast<A>(layout.pixels);
    visit_access<T>(layout, maps.bits | main.bits | aux.bits, [&](auto width, auto last) {
      constexpr int kValues = decltype(width)::value;
      constexpr bool kLast = decltype(last)::value;
      const int64_t columns = entries / (kLast ? kValues : 1);
      const int64_t units = ceil_div<int64_t>(layout.pixels, kLast ? 1 : kValues);
      const auto launch = [&](auto lanes) {
        constexpr int kLanes = decltype(lanes)::value;
        const int64_t parts = parts_of(units, kLanes * kSteps);
        const Tensor partial =
            parts > 1 ? empty_matrix(device, parts * (kDots ? 2 : 1), entries, kSumDtype<A>)
                      : of_main;
        auto* to = static_cast<A*>(partial.mutable_data_ptr());
        const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(columns, kThreads / kLanes)),
                        static_cast<unsigned>(parts));
        channel_sums<T, kValues, kLast, kDots, kLanes><<<grid, kThreads, 0, stream()>>>(
            maps.maps<T>(), main.maps<T>(), aux.maps<T>(), columns, layout.channels, layout.pixels,
            scale, to, parts > 1 ? to + parts * entries : second);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        if (parts == 1) return;
        const dim3 all(static_cast<unsigned>(ceil_div<int64_t>(entries, kThreads)), kDots ? 2 : 1);
        add_parts<<<all, kThreads, 0, stream()>>>(to, parts, entries, first, second);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      };
      if (kLast || units <= kWarp * kSteps) {
        launch(std::integral_constant<int, kWarp>{});
      } else {
        launch(std::integral_constant<int, kThreads>{});
      }
    });
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("se_add_means", TORCH_BOX(&dynmm::se_add_means<dynmm::Sums>));
  m.impl("se_add_dots", TORCH_BOX(&dynmm::se_add_dots<dynmm::Sums>));
}
