#pragma once

// The loops of energy_fuse, compiled for the instruction set of the file that includes this.

#include "cpu/energy_fuse_rows.h"
#include "cpu/energy_grad_rows.h"

namespace dynmm {
namespace DYNMM_LEVEL {

#define DYNMM_ROWS_OF(T)                                                                        \
  template void fuse_rows<T>(const Judged<T>&, const Fused<T>&, int64_t, int64_t);              \
  template void grad_rows<T>(const Judged<T>&, const Incoming<T>&, const Outgoing<T>&, int64_t, \
                             int64_t, Accumulator<T>*);
DYNMM_ROWS_OF(float)
DYNMM_ROWS_OF(double)
DYNMM_ROWS_OF(Half)
DYNMM_ROWS_OF(BFloat16)
#undef DYNMM_ROWS_OF

}  // namespace DYNMM_LEVEL
}  // namespace dynmm
