#include <cstdlib>
#include <string>

#include "cpu/kernels.h"

namespace dive_fast::cpu {

namespace plain {
extern const Kernels table;
}
#ifdef DIVE_FAST_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

const Kernels& choose() {
#ifdef DIVE_FAST_X86
  const char* variable = std::getenv("DIVE_FAST_CPU");
  const std::string cap = variable ? variable : "avx512";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && cap == "avx512") return avx512::table;
  if (has_avx2 && cap != "plain") return avx2::table;
#endif
  return plain::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace dive_fast::cpu
