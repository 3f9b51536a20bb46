#pragma once

#include "cpu/energy_rows.h"

namespace dynmm {
namespace DYNMM_LEVEL {

template <class A>
DYNMM_INLINE Lanes<A> sigmoid(const Lanes<A>& x) {
  const Lanes<A> one = all(A{1});
  return one / (one + exp(all(A{0}) - x));
}

// One unit's gradients. Lanes that hold no class read zeros, and add nothing to any sum.
template <class T, class A = Accumulator<T>>
DYNMM_APART void grad_unit(const Judged<T>& call, const Incoming<T>& in, const Outgoing<T>& out,
                           Unit<A> unit, Strip<A>* logits, A* of_fused) {
  using L = Lanes<A>;
  constexpr int kLanes = Lanes<A>::kCount;
  const int modalities = call.modalities, columns = modalities + 1;
  Strip<A>&own = logits[kMostModalities], &labels = logits[kMostModalities + 1];
  const L zero = all(A{0}), one = all(A{1}), classes = all(static_cast<A>(call.classes));
  const bool named = call.named != nullptr && in.losses != nullptr;
  const bool labelled = call.labels != nullptr && in.losses != nullptr;
  const int64_t room = padded<A>(call.classes);
  Weighed<A> weighed;
  find_present(call, unit, weighed);
  L energy[kMostModalities + 1], of_loss[kMostModalities + 1], of_class[kMostModalities + 1];
  const L exists = existing(call, unit);
  for (int m = 0; m <= modalities; ++m) {
    energy[m] = unit.column(in.energies, columns, m);
    of_loss[m] = in.losses == nullptr ? zero : unit.column(in.losses, columns, m);
    of_class[m] = of_loss[m] * exists;
    if (m < modalities) weighed.confidence[m] = all(call.scale) * energy[m];
  }
  weigh(call, unit, weighed);

  const auto read = [&] {
    for (int m = 0; m < modalities; ++m) {
      unit.read(call.logits[m], weighed.here[m], call.present == nullptr, A{0}, logits[m]);
    }
    if (labelled) unit.read(Maps<const A>{call.labels, call.classes}, one, true, A{0}, labels);
  };

  L of_weight[kMostModalities];
  for (int p = 0; p < unit.pieces(); ++p) {
    L dot[kMostModalities], weights[kMostModalities];
    for (int m = 0; m < modalities; ++m) dot[m] = zero;
    for (int64_t at = 0; at < unit.classes; at += unit.span()) {
      unit.move_to(p, at);
      const Hot<A> hot(call, unit);
      read();
      for (int m = 0; m < modalities; ++m) weights[m] = unit.spread(weighed.weight[m]);
      const L shift = unit.spread(energy[modalities]), scale = unit.spread(of_loss[modalities]);
      const L at_class = unit.spread(of_class[modalities]);
      if (in.fused.base != nullptr) unit.read(in.fused, one, true, A{0}, own);
      for (int64_t k = 0; k < unit.vectors(); ++k) {
        L grad = in.fused.base != nullptr ? own[k] : zero;
        if (named) {
          const L x = fused_at(k, logits, weights, modalities);
          const L slope = scale * exp(x - shift);
          grad = grad + hot.choose(k, slope - at_class, slope);
        }
        if (labelled) {
          const L x = fused_at(k, logits, weights, modalities);
          grad = grad + scale * ((sigmoid(x) - labels[k]) / classes);
        }
        store(grad, of_fused + p * room + at + k * kLanes);
        for (int m = 0; m < modalities; ++m) dot[m] = dot[m] + grad * logits[m][k];
      }
    }
    for (int m = 0; m < modalities; ++m) {
      if (unit.turned) {
        of_weight[m] = dot[m];
      } else {
        set_lane(lane_of(sum_of(dot[m]), 0), p, of_weight[m]);
      }
    }
  }
  L inner = zero, of_energy[kMostModalities];
  for (int m = 0; m < modalities; ++m) {
    of_weight[m] = if_equal(weighed.here[m], one, of_weight[m], zero);
    if (out.weights != nullptr) unit.set_column(of_weight[m], out.weights, modalities, m);
    inner = inner + weighed.weight[m] * of_weight[m];
  }
  for (int m = 0; m < modalities; ++m) {
    L sum = in.confidence == nullptr ? zero : unit.column(in.confidence, modalities, m);
    if (!in.detach && call.weighting == kEnergy) sum = sum + of_weight[m];
    if (!in.detach && call.weighting == kSoftmax) {
      sum = sum + weighed.weight[m] * (of_weight[m] - inner);
    }
    of_energy[m] = all(call.scale) * sum;
    if (named) of_energy[m] = of_energy[m] + of_loss[m];
  }

  for (int p = 0; p < unit.pieces(); ++p) {
    for (int64_t at = 0; at < unit.classes; at += unit.span()) {
      unit.move_to(p, at);
      const Hot<A> hot(call, unit);
      if (!unit.turned) read();
      for (int m = 0; m < modalities; ++m) {
        const L weight = unit.spread(weighed.weight[m]), shift = unit.spread(energy[m]);
        const L scale = unit.spread(of_energy[m]), here = unit.spread(weighed.here[m]);
        const L at_class = unit.spread(of_class[m]), of_labels = unit.spread(of_loss[m]);
        for (int64_t k = 0; k < unit.vectors(); ++k) {
          const L x = logits[m][k];
          L grad = weight * load(of_fused + p * room + at + k * kLanes) + scale * exp(x - shift);
          if (named) grad = hot.choose(k, grad - at_class, grad);
          if (labelled) grad = grad + of_labels * ((sigmoid(x) - labels[k]) / classes);
          own.set(k, if_equal(here, one, grad, zero));
        }
        unit.write(own, out.logits[m]);
      }
    }
  }
}

// Numbers that `grad_rows` keeps.
template <class T, class A = Accumulator<T>>
int64_t kept_by_grads(const Judged<T>& call) {
  constexpr int64_t kLanes = Lanes<A>::kCount;
  if (call.classes <= kFew) return call.classes * kLanes;
  return rows_at_once(call, kLanes) * padded<A>(call.classes);
}

template <class T>
void grad_rows(const Judged<T>& call, const Incoming<T>& in, const Outgoing<T>& out, int64_t begin,
               int64_t end, Accumulator<T>* kept) {
  using A = Accumulator<T>;
  Strip<A> strips[kMostModalities + 2];
  for (int64_t row = begin; row < end;) {
    const Unit<A> unit(row, rows_at_once(call, end - row), call.classes);
    grad_unit(call, in, out, unit, strips, kept);
    row += unit.count;
  }
}

}  // namespace DYNMM_LEVEL
}  // namespace dynmm
