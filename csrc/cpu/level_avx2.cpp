// The loops over rows and those of energy_fuse for processors with AVX2.
#include "cpu/row_loops.h"
#include "energies.h"

#ifdef __x86_64__
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

#define DYNMM_LEVEL avx2
#define DYNMM_VECTOR_BYTES 32
#include "cpu/energy_level.h"
#include "cpu/row_loops_level.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
