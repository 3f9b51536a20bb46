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
__global__ void __launch_bounds__(S::kGroup, resident<T>(1280) / S::kGroup)
    fuse_rows(const __grid_constant__ Judged<T> call, const __grid_constant__ Fused<T> out) {
  using I = typename S::Index;
  const bool inside = S::row() < call.rows;  // who is not repeats the last row and writes nothing
  const int64_t n = inside ? S::row() : call.rows - 1;
  const int modalities = call.modalities;
  const auto units = static_cast<I>(call.classes / S::kValues);
  const I named = class_of<S>(call, n);
  Unit<T, S::kValues> x[S::kUnits];
  A fused[S::kUnits][S::kValues] = {}, fused_named = 0;

  const auto read = [&](int m, I first, I stop) {
    const auto* own = S::own(call.logits[m].sample(n), first);
    S::units(first, stop, [&](int u, int offset) { x[u] = own[offset]; });
  };
  const auto read_named = [&](int m) {
    return static_cast<A>(call.logits[m].sample(n)[max(named, I{0})]);
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
  // Of modality m, or behind the last of what is fused. `loss`: the lane's part of binary ones.
  const auto report = [&](int m, bool here, A energy, A loss, A at_named) {
    if (call.labels != nullptr) loss = S::sum(loss) / static_cast<A>(call.classes);
    if (call.named != nullptr) loss = !here ? A{0} : named < 0 ? A{NAN} : energy - at_named;
    if (!inside || S::lane() > 0) return;
    const int64_t at = n * (modalities + 1) + m;
    out.energies[at] = energy;
    if (out.losses != nullptr) out.losses[at] = loss;
    if (m < modalities) out.confidence[n * modalities + m] = call.scale * energy;
  };

  Blend<T> blend(call, n);
#pragma unroll 1
  for (int m = 0; m < modalities; ++m) {
    const bool here = is_present(call, n, m);
    const I stop = here ? units : 0;
    LogSumExp<S, A> sum;
    A loss = 0;
    S::chunks(stop, [&](I first) {
      read(m, first, stop);
      sum.add(first, stop, value);
      loss += binary_losses(first, stop, value);
    });
    const A all = sum.value(), energy = here ? all : A{0}, at_named = here ? read_named(m) : A{0};
    report(m, here, energy, loss, at_named);
    if (!S::kKept || !here) continue;
    blend.add(m, energy);
    S::values(0, units, [&](int u, int v) {
      fused[u][v] = fused[u][v] * blend.kept + blend.weight * value(u, v);
    });
    fused_named = fused_named * blend.kept + blend.weight * at_named;
  }

  LogSumExp<S, A> sum;
  A loss = 0;
  const auto finish = [&](I first) {
    if (call.named != nullptr) sum.add(first, units, fused_value);
    loss += binary_losses(first, units, fused_value);
    S::write(out.fused + n * call.classes, first, inside ? units : 0, fused_value);
  };
  if constexpr (S::kKept) {
    const A share = blend.share();
    S::values(0, units, [&](int u, int v) { fused[u][v] *= share; });
    fused_named *= share;
    finish(0);
  } else {
    __syncthreads();  // until the energies are written
    const Weights<S, T> weights(call, n, out.energies);
    S::chunks(units, [&](I first) {
      S::values(first, units, [&](int u, int v) { fused[u][v] = 0; });
#pragma unroll 1
      for (int m = 0; m < modalities; ++m) {
        const A weight = weights(m);
        if (!is_present(call, n, m)) continue;
        read(m, first, units);
        S::values(first, units, [&](int u, int v) { fused[u][v] += weight * value(u, v); });
      }
      finish(first);
    });
    for (int m = 0; m < modalities; ++m) {
      const A weight = weights(m);
      if (is_present(call, n, m)) fused_named += weight * read_named(m);
    }
  }
  report(modalities, true, call.named != nullptr ? sum.value() : A{0}, loss, fused_named);
}

struct Fuse : OnDevice {
  using OnDevice::OnDevice;

  template <class T>
  void fuse(const Judged<T>& call, const Fused<T>& out) const {
    visit_share<32>(call, address_bits(out.fused), [&](auto share) {
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
