// energy_fuse_grads on a GPU. A row is read for its part in fused, and again for its own gradient,
// from a cache, unless registers still hold it.
#include "cuda/energy.h"

namespace dynmm {
namespace {

template <class A>
__device__ A sigmoid(A x) {
  return 1 / (1 + exp(-x));
}

template <class T, class S, bool kLabels, class A = Accumulator<T>>
__global__ void __launch_bounds__(S::kGroup, resident<T>() / S::kGroup)
    grad_rows(const __grid_constant__ Judged<T> call, const __grid_constant__ Incoming<T> in,
              const __grid_constant__ Outgoing<T> out) {
  using I = typename S::Index;
  constexpr int kPiece = S::template kPiece<A>;
  using P = Unit<A, kPiece>;
  const bool inside = S::row() < call.rows;  // who is not repeats the last row and writes nothing
  const int64_t n = inside ? S::row() : call.rows - 1;
  const int modalities = call.modalities, own = S::lane() % S::kSide;
  const bool own_here = own < modalities && is_present(call, n, own);
  const auto units = static_cast<I>(call.classes / S::kValues);
  const I named = class_of<S>(call, n);
  const int64_t at = n * (modalities + 1);
  // Whether the gradient of fused goes on through the weights.
  const bool through = !in.detach && (call.weighting == kEnergy || call.weighting == kSoftmax);
  const bool with_mean = through && call.weighting == kSoftmax;
  const bool with_dots = through || call.weighting == kGiven;
  // A loss passes on what it is given, or that of each label its part.
  const auto of_loss_at = [&](int m) {
    const A of_loss = in.losses[at + m];
    return kLabels ? of_loss / static_cast<A>(call.classes) : of_loss;
  };

  A energy = 0, of_energy = 0, of_loss = 0, of_weight = 0;  // the lane's own modality's
  if (own_here) {
    energy = in.energies[at + own];
    if (in.losses != nullptr) of_loss = of_loss_at(own);
    if (in.confidence != nullptr) of_energy = call.scale * in.confidence[at - n + own];
    if (!kLabels) of_energy += of_loss;
  }
  const A weight = weight_of<S>(call, n, own, own_here, energy);

  Unit<T, S::kValues> x[S::kUnits];
  int held = -1;  // the modality in x
  const auto read = [&](int m, I first, I stop) {
    const auto* own = S::own(call.logits[m].sample(n), first);
    S::units(first, stop, [&](int u, int offset) { x[u] = own[offset]; });
    held = m;
  };
  // Adds to a piece of a gradient what goes through the logsumexp of values `of`, their `energy`.
  const auto add_energy = [](const P& of, A of_energy, A energy, P& to) {
#pragma unroll
    for (int v = 0; v < kPiece; ++v) to.value[v] += of_energy * exp(of.value[v] - energy);
  };
  // Adds what else their loss passes on; `offset`: where the piece is.
  const auto add_target = [&](I first, int offset, const P& of, A of_loss, P& to) {
    if constexpr (!kLabels) {
      const I column = max(named, I{0}) - (first + S::lane()) * S::kValues;
#pragma unroll
      for (int v = 0; v < kPiece; ++v) {
        if (offset + v == column) to.value[v] -= named < 0 ? A{NAN} : of_loss;
      }
    } else {
      const P labels = labels_at<S>(call, n, first, offset);
#pragma unroll
      for (int v = 0; v < kPiece; ++v) {
        to.value[v] += of_loss * (sigmoid(of.value[v]) - labels.value[v]);
      }
    }
  };

  // The gradient of a chunk of fused, in place of fused itself, and the lane's part of the product
  // of the two: the mean of what the weights get.
  A of_fused[S::kUnits][S::kValues], mean = 0;
  const auto follow_fused = [&](I first) {
    S::values(first, units, [&](int u, int v) { of_fused[u][v] = 0; });
#pragma unroll 1
    for (int m = 0; m < modalities && (in.losses != nullptr || with_mean); ++m) {
      const A of_m = S::of_lane(m, weight);
      if (!S::of_lane(m, static_cast<int>(own_here))) continue;
      read(m, first, units);
      S::values(first, units,
                [&](int u, int v) { of_fused[u][v] += of_m * static_cast<A>(x[u].value[v]); });
    }
    S::template pieces<A>(first, units, [&](int u, int from, int offset) {
      P fused, grad{};
#pragma unroll
      for (int v = 0; v < kPiece; ++v) fused.value[v] = of_fused[u][from + v];
      if (in.fused.base != nullptr) {
        const auto given = *reinterpret_cast<const Unit<T, kPiece>*>(
            in.fused.sample(n) + (first + S::lane()) * S::kValues + offset);
#pragma unroll
        for (int v = 0; v < kPiece; ++v) grad.value[v] = static_cast<A>(given.value[v]);
      }
      if (in.losses != nullptr) {
        const A of_loss = of_loss_at(modalities), energy = in.energies[at + modalities];
        if (!kLabels && call.named != nullptr) add_energy(fused, of_loss, energy, grad);
        add_target(first, offset, fused, of_loss, grad);
      }
#pragma unroll
      for (int v = 0; v < kPiece; ++v) {
        mean += grad.value[v] * fused.value[v];
        of_fused[u][from + v] = grad.value[v];
      }
    });
  };
  // The lane's part of the product of that with the logits in x: the gradient of their weight.
  const auto dot = [&](I first, I stop) {
    A sum = 0;
    S::values(first, stop,
              [&](int u, int v) { sum += of_fused[u][v] * static_cast<A>(x[u].value[v]); });
    return sum;
  };

  if constexpr (S::kKept) {
    follow_fused(0);
  } else if (with_dots) {
    __shared__ A dots[kMostModalities][S::kGroup];
    for (int m = 0; m < modalities; ++m) dots[m][threadIdx.x] = 0;
    S::chunks(units, [&](I first) {
      follow_fused(first);
#pragma unroll 1
      for (int m = 0; m < modalities; ++m) {
        if (!S::of_lane(m, static_cast<int>(own_here))) continue;
        read(m, first, units);
        dots[m][threadIdx.x] += dot(first, units);
      }
    });
    for (int m = 0; m < modalities; ++m) {
      const A sum = S::sum(dots[m][threadIdx.x]);
      if (own == m) of_weight = sum;
    }
  }
  if (with_mean) mean = S::sum(mean);
  const A whole = mean;

  S::chunks(units, [&](I first) {
    if constexpr (!S::kKept) follow_fused(first);
#pragma unroll 1
    for (int m = modalities; m-- > 0;) {
      const bool here = S::of_lane(m, static_cast<int>(own_here));
      const I stop = here ? units : 0;
      if (!S::kKept || m != held) read(m, first, stop);
      if (S::kKept && with_dots) {
        const A sum = S::sum(dot(first, stop));
        if (own == m) of_weight = sum;
      }
      const A of_x = S::of_lane(m, weight);
      A of_p = S::of_lane(m, of_energy);
      if (through) {
        const A of_w = S::of_lane(m, of_weight);
        of_p += call.scale * (with_mean ? of_x * (of_w - whole) : of_w);
      }
      const A of_target = S::of_lane(m, of_loss), of_all = S::of_lane(m, energy);
      auto* to = S::own(out.logits[m] + n * call.classes, first);
      S::units(first, inside ? units : 0, [&](int u, int offset) {
        Unit<T, S::kValues> result{};
#pragma unroll
        for (int from = 0; from < S::kValues && here; from += kPiece) {
          P values, grad;
#pragma unroll
          for (int v = 0; v < kPiece; ++v) {
            values.value[v] = static_cast<A>(x[u].value[from + v]);
            grad.value[v] = of_x * of_fused[u][from + v];
          }
          add_energy(values, of_p, of_all, grad);
          if (in.losses != nullptr) {
            add_target(first, offset * S::kValues + from, values, of_target, grad);
          }
#pragma unroll
          for (int v = 0; v < kPiece; ++v) {
            result.value[from + v] = static_cast<T>(grad.value[v]);
          }
        }
        to[offset] = result;
      });
    }
  });
  if (out.weights != nullptr && inside && S::lane() < modalities) {
    out.weights[at - n + own] = of_weight;
  }
}

struct Grads : OnDevice {
  using OnDevice::OnDevice;

  template <class T>
  void grads(const Judged<T>& call, const Incoming<T>& in, const Outgoing<T>& out) const {
    uint64_t bits = bits_of(in.fused, call.rows);
    for (int m = 0; m < call.modalities; ++m) bits |= address_bits(out.logits[m]);
    const auto launch = [&](auto share, auto with_labels) {
      using S = decltype(share);
      const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(call.rows, S::kRows));
      grad_rows<T, S, with_labels><<<blocks, S::kGroup, 0, stream()>>>(call, in, out);
    };
    if (call.labels != nullptr) {
      visit_share<16>(call, bits, [&](auto share) { launch(share, std::true_type{}); });
    } else {
      visit_share<56>(call, bits, [&](auto share) { launch(share, std::false_type{}); });
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CUDA, m) {
  m.impl("energy_fuse_grads", TORCH_BOX(&dynmm::energy_fuse_grads<dynmm::Grads>));
}
