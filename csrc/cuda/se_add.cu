// se_add and se_add_grads on a GPU.
#include <initializer_list>

#include "cuda/samples.h"
#include "ops/se_add.h"

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
    const Unit<T, kValues> x = unit_of<kValues>(main, n, at);
    if (n >= active) {
      out[to] = x;
      continue;
    }
    const Unit<T, kValues> y = unit_of<kValues>(aux, n, at);
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
    const Unit<T, kValues> x = unit_of<kValues>(grad, n, at);
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

uint64_t bits_of(std::initializer_list<const Tensor*> tensors) {
  uint64_t bits = 0;
  for (const Tensor* t : tensors) bits |= address_bits(t->const_data_ptr());
  return bits;
}

struct SeAdd : OnDevice {
  using OnDevice::OnDevice;

  template <class T, class A = Accumulator<T>>
  void add(const MapLayout& layout, const Samples& main, const Samples& aux,
           const Tensor& main_scale, const Tensor& aux_scale, int64_t rows, int64_t active,
           const Tensor& out) const {
    const uint64_t bits = main.bits | aux.bits | bits_of({&main_scale, &aux_scale, &out});
    visit_access<T>(layout, bits, [&](auto values, auto last) {
      constexpr int kValues = decltype(values)::value;
      constexpr bool kLast = decltype(last)::value;
      const Tiling tiling(rows, layout.numel() / kValues);
      const auto blocks = static_cast<unsigned>(tiling.blocks);
      scale_and_add<T, kValues, kLast><<<blocks, kThreads, 0, stream()>>>(
          tiling, main.maps<T>(), aux.maps<T>(), data_of<A>(main_scale), data_of<A>(aux_scale),
          rows, active, layout.channels, layout.pixels, units<T, kValues>(out));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class T, class A = Accumulator<T>>
  void grads(const MapLayout& layout, const Samples& grad, const Tensor& main_scale,
             const Tensor& aux_scale, const Tensor& main_shift, const Tensor& aux_shift,
             int64_t rows, int64_t active, const Tensor& main, const Tensor& aux) const {
    const uint64_t bits =
        grad.bits | bits_of({&main_scale, &aux_scale, &main_shift, &aux_shift, &main, &aux});
    visit_access<T>(layout, bits, [&](auto values, auto last) {
      constexpr int kValues = decltype(values)::value;
      constexpr bool kLast = decltype(last)::value;
      const Tiling tiling(rows, layout.numel() / kValues);
      const auto blocks = static_cast<unsigned>(tiling.blocks);
      both_grads<T, kValues, kLast><<<blocks, kThreads, 0, stream()>>>(
          tiling, grad.maps<T>(), data_of<A>(main_scale), data_of<A>(aux_scale),
          data_of<A>(main_shift), data_of<A>(aux_shift), rows, active, layout.channels,
          layout.pixels, units<T, kValues>(main), units<T, kValues>(aux));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  template <class T, int kValues>
  static Unit<T, kValues>* units(const Tensor& t) {
    return static_cast<Unit<T, kValues>*>(t.mutable_data_ptr());
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("se_add", TORCH_BOX(&dynmm::se_add<dynmm::SeAdd>));
  m.impl("se_add_grads", TORCH_BOX(&dynmm::se_add_grads<dynmm::SeAdd>));
}
