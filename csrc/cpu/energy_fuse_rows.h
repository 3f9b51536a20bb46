#pragma once

#include "cpu/energy_rows.h"

namespace dynmm {
namespace DYNMM_LEVEL {

// What is known of rows of logits, of which the lanes saw some classes each.
template <class A>
struct Tally {
  using L = Lanes<A>;

  L largest, sum;  // sum: of e^(x - largest), or of e^x where the largest is infinite
  L chosen;        // the logit of the class that is named
  L losses;        // of labels

  DYNMM_INLINED void begin() {
    largest = all(-Number<A>::kInfinity);
    sum = chosen = losses = all(A{0});
  }

  DYNMM_APART void add_energies(const Unit<A>& unit, const Strip<A>& logits) {
    const int64_t vectors = unit.vectors();
    L top = largest;
    for (int64_t k = 0; k < vectors; ++k) top = larger(logits[k], top);
    if (!unit.turned) top = largest_of(top);
    const L shift = finite_or_zero(top);
    L total = unit.at == 0 ? sum : sum * exp_within(largest - shift);
    for (int64_t k = 0; k < vectors; ++k) total = total + exp_within(logits[k] - shift);
    largest = top;
    sum = total;
  }

  // Of rows that name no class, nothing.
  template <class T>
  DYNMM_INLINED void add_chosen(const Judged<T>& call, const Unit<A>& unit,
                                const Strip<A>& logits) {
    constexpr int kLanes = Lanes<A>::kCount;
    for (int l = 0; l < (unit.turned ? unit.count : 1); ++l) {
      const auto named = static_cast<uint64_t>(call.named[unit.row + unit.piece + l]);
      const uint64_t at = named - static_cast<uint64_t>(unit.at);
      if (at >= static_cast<uint64_t>(unit.size)) continue;
      set_lane(logits.value[unit.turned ? at * kLanes + l : at], l, chosen);
    }
  }

  // Binary cross entropies: (1 - y) x - log(sigmoid(x)).
  DYNMM_APART void add_losses(const Unit<A>& unit, const Strip<A>& logits, const Strip<A>& labels) {
    const L zero = all(A{0}), one = all(A{1}), lane = numbered<A>();
    const int64_t vectors = unit.vectors();
    for (int64_t k = 0; k < vectors; ++k) {
      const L x = logits[k], negative = if_less(zero, x, zero - x, x);
      const L log_sigmoid = if_less(zero, x, zero, x) - log_1_plus(exp(negative));
      const L loss = (one - labels[k]) * x - log_sigmoid;
      const L filled = all(k + 1 < vectors ? static_cast<A>(Lanes<A>::kCount) : unit.filled());
      losses = losses + if_less(lane, filled, loss, zero);
    }
  }

  // To the rows of the piece.
  template <class T>
  DYNMM_INLINED void give_to(const Judged<T>& call, const Unit<A>& unit, Tally& rows) const {
    if (unit.turned) {
      rows = *this;
      return;
    }
    set_lane(lane_of(largest, 0), unit.piece, rows.largest);
    set_lane(lane_of(sum_of(sum), 0), unit.piece, rows.sum);
    if (call.named != nullptr) set_lane(lane_of(chosen, 0), unit.piece, rows.chosen);
    if (call.labels != nullptr) set_lane(lane_of(sum_of(losses), 0), unit.piece, rows.losses);
  }

  DYNMM_INLINED L energy() const {
    const L zero = all(A{0});
    const L endless = if_equal(sum, sum, largest, sum);  // nan if any logit is
    return if_equal(largest - largest, zero, largest + log(sum), endless);
  }

  template <class T>
  DYNMM_INLINED L loss(const Judged<T>& call, const L& energy, const L& exists) const {
    if (call.labels != nullptr) return losses / all(static_cast<A>(call.classes));
    return (energy - chosen) * exists;
  }
};

template <class T, class A = Accumulator<T>>
DYNMM_APART void fuse_unit(const Judged<T>& call, const Fused<T>& out, Unit<A> unit,
                           Strip<A>* logits) {
  using L = Lanes<A>;
  const int modalities = call.modalities, columns = modalities + 1;
  Strip<A>&fused = logits[kMostModalities], &labels = logits[kMostModalities + 1];
  const L zero = all(A{0}), one = all(A{1}), least = all(-Number<A>::kInfinity);
  const L exists = existing(call, unit);
  Weighed<A> weighed;
  find_present(call, unit, weighed);

  const auto read = [&](int m) {
    unit.read(call.logits[m], weighed.here[m], call.present == nullptr, -Number<A>::kInfinity,
              logits[m]);
  };
  const auto read_labels = [&] {
    if (call.labels == nullptr) return;
    unit.read(Maps<const A>{call.labels, call.classes}, one, true, A{0}, labels);
  };
  const auto judge = [&](const Strip<A>& strip, bool energies, Tally<A>& tally) {
    if (energies) tally.add_energies(unit, strip);
    if (call.named != nullptr) tally.add_chosen(call, unit, strip);
    if (call.labels != nullptr) tally.add_losses(unit, strip, labels);
  };

  Tally<A> rows[kMostModalities + 1], piece[kMostModalities];
  for (int m = 0; m <= modalities; ++m) rows[m].begin();
  for (int p = 0; p < unit.pieces(); ++p) {
    for (int m = 0; m < modalities; ++m) piece[m].begin();
    for (int64_t at = 0; at < unit.classes; at += unit.span()) {
      unit.move_to(p, at);
      read_labels();
      for (int m = 0; m < modalities; ++m) {
        read(m);
        judge(logits[m], true, piece[m]);
      }
    }
    for (int m = 0; m < modalities; ++m) piece[m].give_to(call, unit, rows[m]);
  }
  for (int m = 0; m < modalities; ++m) {
    const L energy = if_equal(weighed.here[m], one, rows[m].energy(), zero);
    weighed.confidence[m] = all(call.scale) * energy;
    unit.set_column(energy, out.energies, columns, m);
    unit.set_column(weighed.confidence[m], out.confidence, modalities, m);
    if (out.losses != nullptr) {
      const L loss = rows[m].loss(call, energy, exists);
      unit.set_column(if_equal(weighed.here[m], one, loss, zero), out.losses, columns, m);
    }
  }

  weigh(call, unit, weighed);
  const L lane = numbered<A>();
  for (int p = 0; p < unit.pieces(); ++p) {
    L weights[kMostModalities];
    Tally<A> last;
    last.begin();
    for (int64_t at = 0; at < unit.classes; at += unit.span()) {
      unit.move_to(p, at);
      if (!unit.turned) {
        read_labels();
        for (int m = 0; m < modalities; ++m) read(m);
      }
      for (int m = 0; m < modalities; ++m) weights[m] = unit.spread(weighed.weight[m]);
      const int64_t vectors = unit.vectors();
      for (int64_t k = 0; k < vectors; ++k) fused.set(k, fused_at(k, logits, weights, modalities));
      fused.set(vectors - 1, if_less(lane, all(unit.filled()), fused[vectors - 1], least));
      unit.write(fused, out.fused);
      if (out.losses != nullptr) judge(fused, call.named != nullptr, last);
    }
    if (out.losses != nullptr) last.give_to(call, unit, rows[modalities]);
  }
  L energy = zero;
  if (out.losses != nullptr) {
    if (call.named != nullptr) energy = rows[modalities].energy();
    unit.set_column(rows[modalities].loss(call, energy, exists), out.losses, columns, modalities);
  }
  unit.set_column(energy, out.energies, columns, modalities);
}

template <class T>
void fuse_rows(const Judged<T>& call, const Fused<T>& out, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  Strip<A> strips[kMostModalities + 2];
  for (int64_t row = begin; row < end;) {
    const Unit<A> unit(row, rows_at_once(call, end - row), call.classes);
    fuse_unit(call, out, unit, strips);
    row += unit.count;
  }
}

}  // namespace DYNMM_LEVEL
}  // namespace dynmm
