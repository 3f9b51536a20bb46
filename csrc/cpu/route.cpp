// route: a stable counting sort of the entries by branch.
#include <cmath>

#include "cpu/parallel.h"

namespace dynmm {
namespace {

constexpr int64_t kNone = -1;
constexpr int64_t kFaulty = -2;
constexpr int64_t kEntriesPerThread = 16 * 1024;

struct Plan {
  Tensor order, inverse, header;
};

struct Faults {
  int64_t count = 0;
  int64_t first = -1;
};

// Counting is bound by the latency of a counter in memory. Four runs of entries, each with counters
// of its own, advance side by side; every run keeps its entries in order.
constexpr int64_t kLanes = 4;

// f(lane, e) for all entries e in [begin, end), ascending within a lane, lanes one after the other.
template <class F>
void for_entries(int64_t begin, int64_t end, const F& f) {
  const int64_t run = (end - begin) / kLanes;
  for (int64_t i = 0; i < run; ++i) {
#pragma GCC unroll 4
    for (int64_t lane = 0; lane < kLanes; ++lane) f(lane, begin + lane * run + i);
  }
  for (int64_t e = begin + kLanes * run; e < end; ++e) f(kLanes - 1, e);
}

// decide(entry) is in [0, branches), kNone or kFaulty, and is called once per entry. decided(entry)
// is called later on the same thread and repeats the answer; anything negative is no branch.
template <class Decide, class Decided>
Plan counting_sort(const Tensor& like, int64_t rows, int64_t ranks, int64_t branches,
                   const Decide& decide, const Decided& decided) {
  const int64_t entries = rows * ranks;
  Plan plan{empty_vector(like, entries, ScalarType::Int),
            empty_matrix(like, rows, ranks, ScalarType::Int),
            empty_vector(like, branches + 3, ScalarType::Int)};
  auto* order = static_cast<int32_t*>(plan.order.mutable_data_ptr());
  auto* inverse = static_cast<int32_t*>(plan.inverse.mutable_data_ptr());
  auto* header = static_cast<int32_t*>(plan.header.mutable_data_ptr());

  const int64_t chunks =
      entries <= kEntriesPerThread
          ? 1
          : std::min<int64_t>(torch::stable::get_num_threads(), entries / kEntriesPerThread);
  const int64_t runs = chunks * kLanes;
  std::vector<int32_t> counters(runs * branches, 0);
  int32_t* const next = counters.data();  // [run, branch]: rows, later the next slot
  std::vector<Faults> faults(runs);       // in order of their entries
  Faults* const fault = faults.data();
  // f(run, entry) for all entries, the same way each time.
  const auto over_entries = [&](const auto& f) {
    const auto over_chunks = [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        for_entries(entries * c / chunks, entries * (c + 1) / chunks,
                    [=](int64_t lane, int64_t entry) { f(c * kLanes + lane, entry); });
      }
    };
    if (chunks == 1) return over_chunks(0, 1);
    torch::stable::parallel_for(0, chunks, 1, over_chunks);
  };

  over_entries([=](int64_t run, int64_t entry) {
    const int64_t branch = decide(entry);
    if (branch >= 0) {
      ++next[run * branches + branch];
    } else if (branch == kFaulty && fault[run].count++ == 0) {
      fault[run].first = entry;
    }
  });

  int32_t slot = 0;
  for (int64_t b = 0; b < branches; ++b) {
    header[b] = slot;
    for (int64_t run = 0; run < runs; ++run) {
      const int32_t count = next[run * branches + b];
      next[run * branches + b] = slot;
      slot += count;
    }
  }
  header[branches] = slot;
  Faults all;
  for (const Faults& f : faults) {
    if (all.count == 0) all.first = f.first;
    all.count += f.count;
  }
  header[branches + 1] = static_cast<int32_t>(all.count);
  header[branches + 2] = static_cast<int32_t>(all.first);

  over_entries([=](int64_t run, int64_t entry) {
    const int64_t branch = decided(entry);
    if (branch >= 0) {
      const int32_t where = next[run * branches + branch]++;
      inverse[entry] = where;
      order[where] = static_cast<int32_t>(entry);
    } else {
      inverse[entry] = -1;
    }
  });
  std::fill(order + slot, order + entries, int32_t{-1});
  return plan;
}

template <class T>
Plan route_choice(const Tensor& selection, int64_t rows, int64_t ranks, int64_t branches) {
  const auto* choice = static_cast<const T*>(selection.const_data_ptr());
  const auto decide = [=](int64_t entry) -> int64_t {
    const int64_t branch = static_cast<int64_t>(choice[entry]);
    return branch >= -1 && branch < branches ? branch : kFaulty;
  };
  const auto decided = [=](int64_t entry) -> int64_t {
    const int64_t branch = static_cast<int64_t>(choice[entry]);
    return branch < branches ? branch : kNone;
  };
  return counting_sort(selection, rows, ranks, branches, decide, decided);
}

Plan route_mask(const Tensor& selection, int64_t rows, int64_t branches) {
  const auto* mask = static_cast<const bool*>(selection.const_data_ptr());
  const auto branch_of = [=](int64_t entry) -> int64_t {
    return mask[entry] ? entry % branches : kNone;
  };
  return counting_sort(selection, rows, branches, branches, branch_of, branch_of);
}

// The first of the largest; kFaulty where softmax would be undefined (nan, or no finite maximum).
template <class T>
int64_t argmax(const T* logits, int64_t branches) {
  using Number = Accumulator<T>;
  int64_t best = 0;
  Number top = static_cast<Number>(logits[0]);
  bool ordered = !std::isnan(top);
  for (int64_t b = 1; b < branches; ++b) {
    const Number value = static_cast<Number>(logits[b]);
    ordered &= !std::isnan(value);
    if (value > top) {
      top = value;
      best = b;
    }
  }
  return ordered && std::isfinite(top) ? best : kFaulty;
}

template <class T>
Plan route_logits(const Tensor& logits, int64_t* choice) {
  const int64_t branches = logits.size(1);
  const T* values = static_cast<const T*>(logits.const_data_ptr());
  const auto decide = [=](int64_t n) -> int64_t {
    const int64_t branch = argmax(values + n * branches, branches);
    choice[n] = branch == kFaulty ? kNone : branch;
    return branch;
  };
  const auto decided = [=](int64_t n) -> int64_t { return choice[n]; };
  return counting_sort(logits, logits.size(0), 1, branches, decide, decided);
}

Plan route_selection(const Tensor& selection, int64_t branches) {
  const int64_t rows = selection.size(0);
  const int64_t ranks = selection.dim() == 2 ? selection.size(1) : 1;
  switch (selection.scalar_type()) {
    case ScalarType::Bool:
      return route_mask(selection, rows, branches);
    case ScalarType::Int:
      return route_choice<int32_t>(selection, rows, ranks, branches);
    case ScalarType::Long:
      return route_choice<int64_t>(selection, rows, ranks, branches);
    default:
      return route_choice<int64_t>(torch::stable::to(selection, ScalarType::Long), rows, ranks,
                                   branches);
  }
}

}  // namespace

// selection: int [N, k] or [N], or bool [N, B]. header: B+1 offsets, number of faults, first fault.
std::tuple<Tensor, Tensor, Tensor> route(const Tensor& selection, int64_t branches) {
  Plan plan = route_selection(as_contiguous(selection), branches);
  return {std::move(plan.order), std::move(plan.inverse), std::move(plan.header)};
}

// logits: floating [N, B]. Also returns choice int64 [N]; faulty rows choose -1.
std::tuple<Tensor, Tensor, Tensor, Tensor> route_argmax(const Tensor& logits) {
  const Tensor scores = as_contiguous(logits);
  const Tensor choice = empty_vector(logits, logits.size(0), ScalarType::Long);
  auto* chosen = static_cast<int64_t*>(choice.mutable_data_ptr());
  Plan plan = visit_dtype(scores.scalar_type(),
                          [&](auto zero) { return route_logits<decltype(zero)>(scores, chosen); });
  return {choice, std::move(plan.order), std::move(plan.inverse), std::move(plan.header)};
}

}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CPU, m) {
  m.impl("route", TORCH_BOX(&dynmm::route));
  m.impl("route_argmax", TORCH_BOX(&dynmm::route_argmax));
}
