// What the kernels were built with. No torch headers: this module never depends on torch's ABI.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How the compiled kernels of dynmm_kernels were built.";
  m.attr("compiler") = __VERSION__;
  m.attr("stamp") = DYNMM_STAMP;
  m.attr("torch") = DYNMM_TORCH_VERSION;
  m.attr("sources") = DYNMM_SOURCES;
  m.attr("cuda") = DYNMM_CUDA;
  m.attr("cuda_architectures") = DYNMM_CUDA_ARCHITECTURES;
  m.attr("stable_abi") = "2.10";
}
