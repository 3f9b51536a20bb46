#pragma once

// Marks what kernels and the host share.
#ifdef __CUDACC__
#define DYNMM_HOST_DEVICE __host__ __device__
#else
#define DYNMM_HOST_DEVICE
#endif
