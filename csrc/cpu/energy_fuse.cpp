// energy_fuse and its gradients on the CPU: rows side by side, on the best instruction set.
#include "ops/energy_fuse.h"

#include "cpu/levels.h"
#include "cpu/parallel.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

#define DYNMM_LEVEL baseline
#define DYNMM_VECTOR_BYTES 16
#include "cpu/energy_level.h"

namespace dynmm {

#ifdef __x86_64__
#define DYNMM_ROWS                                                                           \
  template <class T>                                                                         \
  void fuse_rows(const Judged<T>&, const Fused<T>&, int64_t, int64_t);                       \
  template <class T>                                                                         \
  void grad_rows(const Judged<T>&, const Incoming<T>&, const Outgoing<T>&, int64_t, int64_t, \
                 Accumulator<T>*);
namespace avx2 {
DYNMM_ROWS
}
namespace avx512 {
DYNMM_ROWS
}
#endif

namespace {

struct Energies : OnCpu {
  using OnCpu::OnCpu;

  template <class T>
  void fuse(const Judged<T>& call, const Fused<T>& out) const {
    auto* run = &baseline::fuse_rows<T>;
#ifdef __x86_64__
    if (kLevel == Level::kAvx2) run = &avx2::fuse_rows<T>;
    if (kLevel == Level::kAvx512) run = &avx512::fuse_rows<T>;
#endif
    parallel_rows(call.rows, row_bytes(call),
                  [&](int64_t begin, int64_t end) { run(call, out, begin, end); });
  }

  template <class T>
  void grads(const Judged<T>& call, const Incoming<T>& in, const Outgoing<T>& out) const {
    auto* run = &baseline::grad_rows<T>;
#ifdef __x86_64__
    if (kLevel == Level::kAvx2) run = &avx2::grad_rows<T>;
    if (kLevel == Level::kAvx512) run = &avx512::grad_rows<T>;
#endif
    const auto kept = static_cast<size_t>(baseline::kept_by_grads(call));
    parallel_rows(call.rows, row_bytes(call), [&](int64_t begin, int64_t end) {
      std::vector<Accumulator<T>> room(kept);
      run(call, in, out, begin, end, room.data());
    });
  }

 private:
  template <class T>
  static int64_t row_bytes(const Judged<T>& call) {
    return call.classes * call.modalities * static_cast<int64_t>(sizeof(T));
  }
};

}  // namespace
}  // namespace dynmm

STABLE_TORCH_LIBRARY_IMPL(dynmm_kernels, CPU, m) {
  m.impl("energy_fuse", TORCH_BOX(&dynmm::energy_fuse<dynmm::Energies>));
  m.impl("energy_fuse_grads", TORCH_BOX(&dynmm::energy_fuse_grads<dynmm::Energies>));
}
