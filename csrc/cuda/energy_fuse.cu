// energy_fuse on a GPU. Rows are read once; those too long for registers again, from the L2 cache.
#include "cuda/energy.h"

namespace dynmm {
namespace {

// The weights of a row's modalities while their energies come one by one. Those of a softmax are
// then known up to a factor, which changes: the sum so far is multiplied by `kept` before the next
// row is added `weight` times, and by `share()` in the end.
template <class T, class A = Accumulator<T>>
struct Blend {
  const Judged<T>& call;
  int64_t n;
  A top = -INFINITY, total = 0, kept = 1, weight = 0;

  __device__ Blend(const Judged<T>& call, int64_t n) : call(call), n(n) {}

  __device__ void add(int m, A energy) {
    weight = call.scale * energy;
    if (call.weighting == kEnergy) return;
    if (call.weighting == kGiven) {
      weight = call.weights[n * call.modalities + m];
      return;
    }
    const A score = call.weighting == kSoftmax ? weight : A{0};
    const A most = max(top, score), base = base_of(most);
    kept = exp(top - base);
    weight = exp(score - base);
    total = total * kept + weight;
    top = most;
  }

  __device__ A share() const { return total > 0 ? 1 / total : A{1}; }
};

template <class A>
__device__ A binary_loss(A x, A label) {
  return (1 - label) * x - (min(x, A{0}) - log1p(exp(-abs(x))));
}

template <class T, class S, class A = Accumulator<T>>
__global__ void __launch_bounds__(S::kGroup, resident<T>() / S::kGroup)
    fuse_rows(const __grid_constant__ Judged<T> call, const __grid_constant__ Fused<T> out) {
  using I = typename S::Index;
  const bool inside = S::row() < call.rows;  // who is not repeats the last row and writes nothing
  const int64_t n = inside ? S::row() : call.rows - 1;
  const int modalities = call.modalities, own = S::lane() % S::kSide;
  const bool own_here = own < modalities && is_present(call, n, own);
  const auto units = static_cast<I>(call.classes / S::kValues);
  const I named = class_of<S>(call, n);
  const A at_named = own_here ? static_cast<A>(call.logits[own].sample(n)[max(named, I{0})]) : A{0};
  A energy = 0, loss = 0;  // of the lane's own modality

  Unit<T, S::kValues> x[S::kUnits];
  A fused[S::kUnits][S::kValues] = {};
  const auto read = [&](int m, I first, I stop) {
    const auto* from = S::own(call.logits[m].sample(n), first);
    S::all_units(first, stop, [&](int u, int offset, bool inside) {
#pragma unroll
      for (int v = 0; v < S::kValues; ++v) x[u].value[v] = static_cast<T>(-INFINITY);
      if (inside) x[u] = from[offset];
    });
  };
  const auto value = [&](int u, int v) { return static_cast<A>(x[u].value[v]); };
  const auto fused_value = [&](int u, int v) { return fused[u][v]; };
  const auto binary_losses = [&](I first, I stop, const auto& of) {
    A sum = 0;
    if (call.labels == nullptr) return sum;
    S::template pieces<A>(first, stop, [&](int u, int from, int offset) {
      const auto labels = labels_at<S>(call, n, first, offset);
#pragma unroll
      for (int v = 0; v < S::template kPiece<A>; ++v) {
        sum += binary_loss(of(u, from + v), labels.value[v]);
      }
    });
    return sum;
  };
  const auto loss_of = [&](A energy, A at_named, A binary) {
    if (call.labels != nullptr) return S::sum(binary) / static_cast<A>(call.classes);
    return named < 0 ? A{NAN} : energy - at_named;
  };

  Blend<T> blend(call, n);
#pragma unroll 1
  for (int m = 0; m < modalities; ++m) {
    const bool here = S::of_lane(m, static_cast<int>(own_here));
    const I stop = here ? units : 0;
    LogSumExp<S, A> sum;
    A binary = 0;
    S::chunks(stop, [&](I first) {
      read(m, first, stop);
      sum.add(first, stop, value);
      binary += binary_losses(first, stop, value);
    });
    const A of_all = sum.value(), of_loss = loss_of(of_all, at_named, binary);
    if (own == m && here) {
      energy = of_all;
      loss = of_loss;
    }
    if (!S::kKept || !here) continue;
    blend.add(m, of_all);
    S::all_values(0, units, [&](int u, int v) {
      fused[u][v] = fused[u][v] * blend.kept + blend.weight * value(u, v);
    });
  }

  const A weight = weight_of<S>(call, n, own, own_here, energy);
  LogSumExp<S, A> sum;
  A binary = 0;
  const auto finish = [&](I first) {
    S::all_units(first, units, [&](int u, int, bool inside) {
#pragma unroll
      for (int v = 0; v < S::kValues && !inside; ++v) fused[u][v] = -INFINITY;
    });
    if (call.named != nullptr) sum.add(first, units, fused_value);
    binary += binary_losses(first, units, fused_value);
    S::write(out.fused + n * call.classes, first, inside ? units : 0, fused_value);
  };
  if constexpr (S::kKept) {
    const A share = blend.share();
    S::all_values(0, units, [&](int u, int v) { fused[u][v] *= share; });
    finish(0);
  } else {
    S::chunks(units, [&](I first) {
      S::all_values(first, units, [&](int u, int v) { fused[u][v] = 0; });
#pragma unroll 1
      for (int m = 0; m < modalities; ++m) {
        const A of_m = S::of_lane(m, weight);
        if (!S::of_lane(m, static_cast<int>(own_here))) continue;
        read(m, first, units);
        S::all_values(first, units, [&](int u, int v) { fused[u][v] += of_m * value(u, v); });
      }
      finish(first);
    });
  }
  const A last = call.named != nullptr ? sum.value() : A{0};
  const A fused_named =
      S::over(kMostModalities, own_here ? weight * at_named : A{0}, [](A a, A b) { return a + b; });
  const A last_loss = loss_of(last, fused_named, binary);
  const int64_t at = n * (modalities + 1);
  if (inside && S::lane() < modalities) {
    out.energies[at + own] = energy;
    out.confidence[at - n + own] = call.scale * energy;
    if (out.losses != nullptr) out.losses[at + own] = loss;
  }
  if (inside && S::lane() == 0) {
    out.energies[at + modalities] = last;
    if (out.losses != nullptr) out.losses[at + modalities] = last_loss;
  }
}

struct Fuse : OnDevice {
  using OnDevice::OnDevice;

  template <class T>
  void fuse(const Judged<T>& call, const Fused<T>& out) const {
    visit_share<56>(call, address_bits(out.fused), [&](auto share) {
      using S = decltype(share);
      const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(call.rows, S::kRows));
      fuse_rows<T, S><<<blocks, S::kGroup, 0, stream()>>>(call, out);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("energy_fuse", TORCH_BOX(&dynmm::energy_fuse<dynmm::Fuse>));
}
