#include <cstdlib>
#include <string>

#include "cpu/kernels.h"

namespace dive_fast::cpu {

namespace plain {
extern const Kernels table;
extern const SearchKernels search_table;
}  // namespace plain
#ifdef DIVE_FAST_X86
namespace avx2 {
extern const Kernels table;
extern const SearchKernels search_table;
}  // namespace avx2
namespace avx512 {
extern const Kernels table;
extern const SearchKernels search_table;
}  // namespace avx512
#endif

namespace {

struct Set {
  const Kernels& rows;
  const SearchKernels& search;
};

Set choose() {
#ifdef DIVE_FAST_X86
  const char* variable = std::getenv("DIVE_FAST_CPU");
  const std::string cap = variable ? variable : "avx512";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && cap == "avx512") return {avx512::table, avx512::search_table};
  if (has_avx2 && cap != "plain") return {avx2::table, avx2::search_table};
#endif
  return {plain::table, plain::search_table};
}

const Set& chosen() {
  static const Set set = choose();
  return set;
}

}  // namespace

const Kernels& kernels() { return chosen().rows; }

const SearchKernels& search_kernels() { return chosen().search; }

}  // namespace dive_fast::cpu
