// se_add: out = main_scale * main + aux_scale * aux on the first samples of a batch, main behind
// them; se_add_grads: scale * grad + shift on them for both streams, for main also grad behind
// them.
#include <tuple>

#include "cuda/samples.h"

namespace dynmm {
namespace {

// The factors [C] of the values from element `first` of a sample on. With channels last they lie
// together; else one unit may cover the end of a channel and the beginning of the next.
template <bool kLast, int kValues, class A>
__device__ void factors_of(const A* factors, int64_t channels, int64_t pixels, int64_t first,
                           A (&of)[kValues]) {
  if constexpr (kLast) {
    constexpr int kPiece = kValues < kWideValues<A> ? kValues : kWideValues<A>;
    const auto* pieces = reinterpret_cast<const Unit<A, kPiece>*>(factors + first % channels);
#pragma unroll
    for (int i = 0; i < kValues / kPiece; ++i) {
      const Unit<A, kPiece> piece = pieces[i];
#pragma unroll
      for (int v = 0; v < kPiece; ++v) of[i * kPiece + v] = piece.value[v];
    }
  } else {
    int64_t channel = first / pixels, left = pixels - first % pixels;
    A factor = factors[channel];
#pragma unroll
    for (int v = 0; v < kValues; ++v, --left) {
      if (left == 0) {
        factor = factors[++channel];
        left = pixels;
      }
      of[v] = factor;
    }
  }
}

template <class T, int kValues, bool kLast, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads)
    scale_and_add(const __grid_constant__ Tiling tiling, Maps<T> main, Maps<T> aux,
                  const A* main_scale, const A* aux_scale, int64_t rows, int64_t active,
                  int64_t channels, int64_t pixels, Unit<T, kValues>* out) {
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    int64_t n, unit;
    if (!locate(tiling, blockIdx.x, threadIdx.x + i * kThreads, rows, &n, &unit)) continue;
    const int64_t at = unit * kValues, to = n * tiling.units + unit;
    const Unit<T, kValues> x = main.template unit<kValues>(n, at);
    if (n >= active) {
      out[to] = x;
      continue;
    }
    const Unit<T, kValues> y = aux.template unit<kValues>(n, at);
    A s[kValues], t[kValues];
    factors_of<kLast>(main_scale + n * channels, channels, pixels, at, s);
    factors_of<kLast>(aux_scale + n * channels, channels, pixels, at, t);
    Unit<T, kValues> total;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const A product = s[v] * static_cast<A>(x.value[v]);
      total.value[v] = static_cast<T>(product + t[v] * static_cast<A>(y.value[v]));
    }
    out[to] = total;
  }
}

// A stream's gradient: scale * grad + shift.
template <class T, int kValues, bool kLast, class A>
__device__ Unit<T, kValues> scaled_and_shifted(const Unit<T, kValues>& grad, const A* scale,
                                               const A* shift, int64_t channels, int64_t pixels,
                                               int64_t at) {
  A s[kValues], u[kValues];
  factors_of<kLast>(scale, channels, pixels, at, s);
  factors_of<kLast>(shift, channels, pixels, at, u);
  Unit<T, kValues> result;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    result.value[v] = static_cast<T>(s[v] * static_cast<A>(grad.value[v]) + u[v]);
  }
  return result;
}

template <class T, int kValues, bool kLast, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads)
    both_grads(const __grid_constant__ Tiling tiling, Maps<T> grad, const A* main_scale,
               const A* aux_scale, const A* main_shift, const A* aux_shift, int64_t rows,
               int64_t active, int64_t channels, int64_t pixels, Unit<T, kValues>* main,
               Unit<T, kValues>* aux) {
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    int64_t n, unit;
    if (!locate(tiling, blockIdx.x, threadIdx.x + i * kThreads, rows, &n, &unit)) continue;
    const int64_t at = unit * kValues, to = n * tiling.units + unit, of = n * channels;
    const Unit<T, kValues> x = grad.template unit<kValues>(n, at);
    if (n >= active) {
      main[to] = x;
      continue;
    }
    main[to] = scaled_and_shifted<T, kValues, kLast>(x, main_scale + of, main_shift + of, channels,
                                                     pixels, at);
    aux[to] = scaled_and_shifted<T, kValues, kLast>(x, aux_scale + of, aux_shift + of, channels,
                                                    pixels, at);
  }
}

}  // namespace

Tensor se_add(const Tensor& main, const Tensor& aux, const Tensor& main_scale,
              const Tensor& aux_scale) {
  const OnDeviceOf device(main);
  const cudaStream_t stream = device.stream();
  const MapLayout layout(main);
  const int64_t rows = main.size(0), active = aux.size(0);
  const Tensor out = layout.empty(main, rows);
  if (rows == 0 || layout.numel() == 0) return out;
  const Samples m(main, layout), a(aux, layout);
  const Tensor s = as_contiguous(main_scale), t = as_contiguous(aux_scale);
  void* to = out.mutable_data_ptr();
  uint64_t bits = m.bits | a.bits | address_bits(to);
  for (const Tensor& of : {s, t}) bits |= address_bits(of.const_data_ptr());
  visit_floating(main.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    visit_access<T>(layout, bits, [&](auto values, auto last) {
      constexpr int kValues = decltype(values)::value;
      constexpr bool kLast = decltype(last)::value;
      const Tiling tiling(rows, layout.numel() / kValues);
      const auto blocks = static_cast<unsigned>(tiling.blocks);
      scale_and_add<T, kValues, kLast><<<blocks, kThreads, 0, stream>>>(
          tiling, m.maps<T>(), a.maps<T>(), factors<T>(s), factors<T>(t), rows, active,
          layout.channels, layout.pixels, static_cast<Unit<T, kValues>*>(to));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<Tensor, Tensor> se_add_grads(const Tensor& grad, const Tensor& main_scale,
                                        const Tensor& aux_scale, const Tensor& main_shift,
                                        const Tensor& aux_shift) {
  const OnDeviceOf device(grad);
  const cudaStream_t stream = device.stream();
  const MapLayout layout(grad);
  const int64_t rows = grad.size(0), active = main_scale.size(0);
  const Tensor main = layout.empty(grad, rows), aux = layout.empty(grad, active);
  if (rows == 0 || layout.numel() == 0) return {main, aux};
  const Samples g(grad, layout);
  const Tensor s = as_contiguous(main_scale), t = as_contiguous(aux_scale);
  const Tensor u = as_contiguous(main_shift), v = as_contiguous(aux_shift);
  void *to_main = main.mutable_data_ptr(), *to_aux = aux.mutable_data_ptr();
  uint64_t bits = g.bits | address_bits(to_main) | address_bits(to_aux);
  for (const Tensor& of : {s, t, u, v}) bits |= address_bits(of.const_data_ptr());
  visit_floating(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    visit_access<T>(layout, bits, [&](auto values, auto last) {
      constexpr int kValues = decltype(values)::value;
      constexpr bool kLast = decltype(last)::value;
      const Tiling tiling(rows, layout.numel() / kValues);
      const auto blocks = static_cast<unsigned>(tiling.blocks);
      both_grads<T, kValues, kLast><<<blocks, kThreads, 0, stream>>>(
          tiling, g.maps<T>(), factors<T>(s), factors<T>(t), factors<T>(u), factors<T>(v), rows,
          active, layout.channels, layout.pixels, static_cast<Unit<T, kValues>*>(to_main),
          static_cast<Unit<T, kValues>*>(to_aux));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {main, aux};
}

}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("se_add", TORCH_BOX(&dynmm::se_add));
  m.impl("se_add_grads", TORCH_BOX(&dynmm::se_add_grads));
}
