// route on the CPU: a stable counting sort of the entries by branch.
#include "ops/route.h"

#include <utility>

#include "cpu/parallel.h"

namespace dynmm {
namespace {

constexpr int64_t kEntriesPerThread = 16 * 1024;

struct Faults {
  int64_t count = 0;
  int64_t first = -1;
};

// Counting is bound by the latency of a counter in memory. Four runs of entries, each with counters
// of its own, advance side by side; every run keeps its entries in order.
constexpr int64_t kLanes = 4;
constexpr int64_t kApart = 64 / sizeof(int32_t);

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

struct Sort : OnCpu {
  using OnCpu::OnCpu;

  // select(entry) is called once per entry, select.again(entry) later on the same thread.
  template <class Select>
  void sort(const Plan& plan, const Select& select) const {
    const int64_t entries = plan.entries, branches = plan.branches;
    int32_t *order = plan.order, *inverse = plan.inverse, *header = plan.header;
    const int64_t chunks =
        entries <= kEntriesPerThread
            ? 1
            : std::min<int64_t>(torch::stable::get_num_threads(), entries / kEntriesPerThread);
    // [chunk, lane, branch]: rows, later the next slot; no two chunks share a line of the cache.
    const int64_t pitch = kLanes * branches + kApart;
    std::vector<int32_t> counters(chunks * pitch, 0);
    std::vector<Faults> faults(chunks * kLanes);  // in order of their entries
    int32_t* const next = counters.data();
    Faults* const fault = faults.data();
    // f(the counters of a lane, its faults, entry) for all entries, the same way each time.
    const auto over_entries = [&](const auto& f) {
      const auto over_chunks = [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) {
          for_entries(entries * c / chunks, entries * (c + 1) / chunks,
                      [=](int64_t lane, int64_t entry) {
                        f(next + c * pitch + lane * branches, fault + c * kLanes + lane, entry);
                      });
        }
      };
      if (chunks == 1) return over_chunks(0, 1);
      torch::stable::parallel_for(0, chunks, 1, over_chunks);
    };

    over_entries([=](int32_t* counter, Faults* faulty, int64_t entry) {
      const int branch = select(entry);
      if (branch >= 0) {
        ++counter[branch];
      } else if (branch == kFaulty && faulty->count++ == 0) {
        faulty->first = entry;
      }
    });

    int32_t slot = 0;
    for (int64_t b = 0; b < branches; ++b) {
      header[b] = slot;
      for (int64_t c = 0; c < chunks; ++c) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          slot += std::exchange(next[c * pitch + lane * branches + b], slot);
        }
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

    over_entries([=](int32_t* counter, Faults*, int64_t entry) {
      const int branch = select.again(entry);
      if (branch >= 0) {
        const int32_t where = counter[branch]++;
        inverse[entry] = where;
        order[where] = static_cast<int32_t>(entry);
      } else {
        inverse[entry] = -1;
      }
    });
    std::fill(order + slot, order + entries, int32_t{-1});
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CPU, m) {
  m.impl("route", TORCH_BOX(&dynmm::route<dynmm::Sort>));
  m.impl("route_argmax", TORCH_BOX(&dynmm::route_argmax<dynmm::Sort>));
}
