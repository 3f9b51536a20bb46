// se_add_means: the mean of each channel of each sample; se_add_dots: the inner products of each
// channel of grad with those of main and of aux. Sums are taken in an order that never changes.
#include <tuple>

#include "cuda/samples.h"

namespace dynmm {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kSteps = 16;  // units that one thread takes before more threads are asked for
constexpr int64_t kMostParts = 64;

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
    Unit<T, kValues> x = maps.template unit<kValues>(n, at), y, z;
    if constexpr (kDots) y = main.template unit<kValues>(n, at);
    if constexpr (kDots) z = aux.template unit<kValues>(n, at);
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

// The sums over parts [2 or 1, parts, entries]; the block's y says which.
template <class A>
__global__ void __launch_bounds__(kThreads)
    add_channel_parts(const A* parts, int64_t count, int64_t entries, A* first, A* second) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= entries) return;
  const A* from = parts + blockIdx.y * count * entries + i;
  A sum = 0;
  for (int64_t p = 0; p < count; ++p) sum += from[p * entries];
  (blockIdx.y == 0 ? first : second)[i] = sum;
}

template <class A>
A* values(const Tensor& sums) {
  return static_cast<A*>(sums.mutable_data_ptr());
}

// first, second: [n, C].
template <bool kDots>
void sum_channels(const MapLayout& layout, const Samples& maps, const Samples& main,
                  const Samples& aux, const Tensor& first, const Tensor& second,
                  cudaStream_t stream) {
  const int64_t entries = first.numel();
  if (entries == 0) return;
  visit_floating(maps.kept.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const A scale = kDots ? A{1} : A{1} / static_cast<A>(layout.pixels);
    visit_access<T>(layout, maps.bits | main.bits | aux.bits, [&](auto width, auto last) {
      constexpr int kValues = decltype(width)::value;
      constexpr bool kLast = decltype(last)::value;
      const int64_t columns = entries / (kLast ? kValues : 1);
      const int64_t units = ceil_div<int64_t>(layout.pixels, kLast ? 1 : kValues);
      const auto launch = [&](auto lanes) {
        constexpr int kLanes = decltype(lanes)::value;
        const int64_t parts = std::clamp<int64_t>(ceil_div(units, kLanes * kSteps), 1, kMostParts);
        const Tensor partial =
            parts > 1 ? empty_matrix(first, parts * (kDots ? 2 : 1), entries, first.scalar_type())
                      : first;
        A* to = values<A>(partial);
        const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(columns, kThreads / kLanes)),
                        static_cast<unsigned>(parts));
        channel_sums<T, kValues, kLast, kDots, kLanes><<<grid, kThreads, 0, stream>>>(
            maps.maps<T>(), main.maps<T>(), aux.maps<T>(), columns, layout.channels, layout.pixels,
            scale, to, parts > 1 ? to + parts * entries : values<A>(second));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        if (parts == 1) return;
        const dim3 all(static_cast<unsigned>(ceil_div<int64_t>(entries, kThreads)), kDots ? 2 : 1);
        add_channel_parts<<<all, kThreads, 0, stream>>>(to, parts, entries, values<A>(first),
                                                        values<A>(second));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      };
      if (kLast || units <= kWarp * kSteps) {
        launch(std::integral_constant<int, kWarp>{});
      } else {
        launch(std::integral_constant<int, kThreads>{});
      }
    });
  });
}

}  // namespace

Tensor se_add_means(const Tensor& maps) {
  const OnDeviceOf device(maps);
  const MapLayout layout(maps);
  const Tensor means = layout.empty_sums(maps, maps.size(0));
  const Samples m(maps, layout);
  sum_channels<false>(layout, m, m, m, means, means, device.stream());
  return means;
}

std::tuple<Tensor, Tensor> se_add_dots(const Tensor& grad, const Tensor& main, const Tensor& aux) {
  const OnDeviceOf device(grad);
  const MapLayout layout(grad);
  const Tensor of_main = layout.empty_sums(grad, aux.size(0));
  const Tensor of_aux = layout.empty_sums(grad, aux.size(0));
  const Samples g(grad, layout), m(main, layout), a(aux, layout);
  sum_channels<true>(layout, g, m, a, of_main, of_aux, device.stream());
  return {of_main, of_aux};
}

}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("se_add_means", TORCH_BOX(&dynmm::se_add_means));
  m.impl("se_add_dots", TORCH_BOX(&dynmm::se_add_dots));
}
