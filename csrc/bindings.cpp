// dive_fast._build_info: how the library was compiled, and nothing else. The ops are reached
// through torch's dispatcher; pybind11 ties to one Python, so it stays out of the stable-ABI
// library.

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How the compiled library was built.";
  m.attr("compiler") = DIVE_FAST_COMPILER;
  m.attr("cuda_architectures") = DIVE_FAST_CUDA_ARCHITECTURES;  // empty without CUDA kernels
  m.attr("flags") = DIVE_FAST_FLAGS;
  m.attr("torch_version") = DIVE_FAST_TORCH_VERSION;
}
