// What the library says about itself. The ops' schemas and references live in dive_fast/ops; the
// other files here only add kernels to them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cpu/kernels.h"

namespace dive_fast {
namespace {

std::string cpu_instruction_set() { return cpu::kernels().instruction_set; }

}  // namespace
}  // namespace dive_fast

STABLE_TORCH_LIBRARY_FRAGMENT(dive_fast, m) { m.def("cpu_instruction_set() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(dive_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&dive_fast::cpu_instruction_set));
}
