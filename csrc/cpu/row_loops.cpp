// The loops over rows for every processor, and the choice among those for better ones.
#include "cpu/row_loops.h"

#include "cpu/levels.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

#define DYNMM_LEVEL baseline
#define DYNMM_VECTOR_BYTES 16
#include "cpu/row_loops_level.h"

namespace dynmm {

#ifdef __x86_64__
namespace avx2 {
template <class T>
RowLoops<T> row_loops();
}
namespace avx512 {
template <class T>
RowLoops<T> row_loops();
}
#endif

template <class T>
RowLoops<T> row_loops() {
#ifdef __x86_64__
  if (kLevel == Level::kAvx2) return avx2::row_loops<T>();
  if (kLevel == Level::kAvx512) return avx512::row_loops<T>();
#endif
  return baseline::row_loops<T>();
}

template RowLoops<double> row_loops<double>();
template RowLoops<float> row_loops<float>();
template RowLoops<torch::headeronly::Half> row_loops<torch::headeronly::Half>();
template RowLoops<torch::headeronly::BFloat16> row_loops<torch::headeronly::BFloat16>();

}  // namespace dynmm
