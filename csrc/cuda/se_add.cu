// se_add and se_add_grads on a GPU.
#include <initializer_list>

#include "cuda/samples.h"
#include "ops/se_add.h"

namespace dynmm {
namespace {

constexpr int64_t kMostNarrow = INT32_MAX;  // values of a sample whose places 32 bits tell

// Where all values of one unit lie; the two channels are neighbours.
enum class Within { kChannel, kTwoChannels, kPixel };

template <Within kWithin>
constexpr std::integral_constant<Within, kWithin> kUnitsWithin{};

// Where a unit lies among the factors [C] of its sample, and how many of its values are of the
// first channel. `period`: units of a channel, values of a channel, or units of a pixel.
template <Within kWithin, int kValues, class Index>
struct Place {
  Index channel;
  int left = kValues;

  __device__ Place(Index unit, Index period) {
    if constexpr (kWithin == Within::kChannel) {
      channel = unit / period;
    } else if constexpr (kWithin == Within::kTwoChannels) {
      channel = unit * kValues / period;
      left = static_cast<int>(min((channel + 1) * period - unit * kValues, Index{kValues}));
    } else {
      channel = unit % period * kValues;
    }
  }
};

// The factors of a unit's values.
template <Within kWithin, int kValues, class A>
struct Factors {
  static constexpr int kCount = kWithin == Within::kChannel       ? 1
                                : kWithin == Within::kTwoChannels ? 2
                                                                  : kValues;

  A factor[kCount];
  int left;

  template <class Index>
  __device__ Factors(const A* factors, const Place<kWithin, kValues, Index>& place)
      : left(place.left) {
    const A* from = factors + place.channel;
    if constexpr (kWithin == Within::kPixel) {
      constexpr int kPiece = kValues < kWideValues<A> ? kValues : kWideValues<A>;
#pragma unroll
      for (int i = 0; i < kValues; i += kPiece) {
        const auto piece = *reinterpret_cast<const Unit<A, kPiece>*>(from + i);
#pragma unroll
        for (int v = 0; v < kPiece; ++v) factor[i + v] = piece.value[v];
      }
    } else {
      factor[0] = from[0];
      if constexpr (kWithin == Within::kTwoChannels) factor[1] = left < kValues ? from[1] : from[0];
    }
  }

  __device__ A operator[](int v) const {
    if constexpr (kWithin == Within::kPixel) return factor[v];
    if constexpr (kWithin == Within::kTwoChannels) return v < left ? factor[0] : factor[1];
    return factor[0];
  }
};

// Blocks take the tiles from the last to the first: what the sums before read last is still in the
// cache.
__device__ uint32_t own_tile() { return gridDim.x - 1 - blockIdx.x; }

// A thread loads kUnroll units, half of them from each stream, before it stores the first.
template <class T, int kValues, Within kWithin, class Index, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, 4)
    scale_and_add(const __grid_constant__ Tiling tiling, Maps<T> main, Maps<T> aux,
                  const A* main_scale, const A* aux_scale, int64_t rows, int64_t active,
                  int64_t channels, Index period, Unit<T, kValues>* out) {
  constexpr int kBoth = kUnroll / 2;
#pragma unroll 1
  for (int first = threadIdx.x; first < kPieces; first += kBoth * kThreads) {
    Unit<T, kValues> x[kBoth], y[kBoth];
    int64_t n;
    Index unit;
#pragma unroll
    for (int i = 0; i < kBoth; ++i) {
      if (!locate(tiling, own_tile(), first + i * kThreads, rows, &n, &unit)) continue;
      x[i] = units_of<kValues>(main, n)[unit];
      if (n < active) y[i] = units_of<kValues>(aux, n)[unit];
    }
#pragma unroll
    for (int i = 0; i < kBoth; ++i) {
      if (!locate(tiling, own_tile(), first + i * kThreads, rows, &n, &unit)) continue;
      const int64_t to = n * tiling.units + unit;
      if (n >= active) {
        out[to] = x[i];
        continue;
      }
      const Place<kWithin, kValues, Index> place(unit, period);
      const Factors<kWithin, kValues, A> s(main_scale + n * channels, place);
      const Factors<kWithin, kValues, A> t(aux_scale + n * channels, place);
      Unit<T, kValues> total;
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        const A product = s[v] * static_cast<A>(x[i].value[v]);
        total.value[v] = static_cast<T>(product + t[v] * static_cast<A>(y[i].value[v]));
      }
      out[to] = total;
    }
  }
}

// A stream's gradient: scale * grad + shift.
template <class T, int kValues, class F>
__device__ Unit<T, kValues> scaled_and_shifted(const Unit<T, kValues>& grad, const F& scale,
                                               const F& shift) {
  Unit<T, kValues> result;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    result.value[v] =
        static_cast<T>(scale[v] * static_cast<Accumulator<T>>(grad.value[v]) + shift[v]);
  }
  return result;
}

template <class T, int kValues, Within kWithin, class Index, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, 4)
    both_grads(const __grid_constant__ Tiling tiling, Maps<T> grad, const A* main_scale,
               const A* aux_scale, const A* main_shift, const A* aux_shift, int64_t rows,
               int64_t active, int64_t channels, Index period, Unit<T, kValues>* main,
               Unit<T, kValues>* aux) {
  Unit<T, kValues> x[kUnroll];
  int64_t n;
  Index unit;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (!locate(tiling, own_tile(), threadIdx.x + i * kThreads, rows, &n, &unit)) continue;
    x[i] = units_of<kValues>(grad, n)[unit];
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (!locate(tiling, own_tile(), threadIdx.x + i * kThreads, rows, &n, &unit)) continue;
    const int64_t to = n * tiling.units + unit, of = n * channels;
    if (n >= active) {
      main[to] = x[i];
      continue;
    }
    using F = Factors<kWithin, kValues, A>;
    const Place<kWithin, kValues, Index> place(unit, period);
    main[to] = scaled_and_shifted(x[i], F(main_scale + of, place), F(main_shift + of, place));
    aux[to] = scaled_and_shifted(x[i], F(aux_scale + of, place), F(aux_shift + of, place));
  }
}

// Calls f(values per access, where they lie, period), all but the number of the period as types.
template <class T, class F>
void visit_within(const MapLayout& layout, uint64_t bits, const F& f) {
  const bool narrow = layout.numel() <= kMostNarrow;
  const auto visit_index = [&](auto values, auto within, int64_t period) {
    if (narrow) {
      f(values, within, static_cast<uint32_t>(period));
    } else {
      f(values, within, static_cast<uint64_t>(period));
    }
  };
  visit_access<T>(layout, bits, [&](auto values, auto last) {
    constexpr int kValues = decltype(values)::value;
    if constexpr (decltype(last)::value) {
      visit_index(values, kUnitsWithin<Within::kPixel>, layout.channels / kValues);
    } else if (layout.pixels % kValues == 0) {
      visit_index(values, kUnitsWithin<Within::kChannel>, layout.pixels / kValues);
    } else if constexpr (kValues > 1) {
      if (narrow && layout.pixels > kValues) {
        f(values, kUnitsWithin<Within::kTwoChannels>, static_cast<uint32_t>(layout.pixels));
      } else {
        visit_index(std::integral_constant<int, 1>{}, kUnitsWithin<Within::kChannel>,
                    layout.pixels);
      }
    }
  });
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
    visit_within<T>(layout, bits, [&](auto values, auto within, auto period) {
      constexpr int kValues = decltype(values)::value;
      const Tiling tiling(rows, layout.numel() / kValues);
      const auto blocks = static_cast<unsigned>(tiling.blocks);
      scale_and_add<T, kValues, decltype(within)::value><<<blocks, kThreads, 0, stream()>>>(
          tiling, main.maps<T>(), aux.maps<T>(), data_of<A>(main_scale), data_of<A>(aux_scale),
          rows, active, layout.channels, period, units<T, kValues>(out));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class T, class A = Accumulator<T>>
  void grads(const MapLayout& layout, const Samples& grad, const Tensor& main_scale,
             const Tensor& aux_scale, const Tensor& main_shift, const Tensor& aux_shift,
             int64_t rows, int64_t active, const Tensor& main, const Tensor& aux) const {
    const uint64_t bits =
        grad.bits | bits_of({&main_scale, &aux_scale, &main_shift, &aux_shift, &main, &aux});
    visit_within<T>(layout, bits, [&](auto values, auto within, auto period) {
      constexpr int kValues = decltype(values)::value;
      const Tiling tiling(rows, layout.numel() / kValues);
      const auto blocks = static_cast<unsigned>(tiling.blocks);
      both_grads<T, kValues, decltype(within)::value><<<blocks, kThreads, 0, stream()>>>(
          tiling, grad.maps<T>(), data_of<A>(main_scale), data_of<A>(aux_scale),
          data_of<A>(main_shift), data_of<A>(aux_shift), rows, active, layout.channels, period,
          units<T, kValues>(main), units<T, kValues>(aux));
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
