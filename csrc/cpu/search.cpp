// Tiles of a nearest-neighbour search: a few queries against a few rows, like the inner kernel of a
// matrix product. Compiled once per instruction set, under the rules that stand in rows.cpp.
//
// Squared distances are summed from differences, not from |q|^2 - 2 q.r + |r|^2: rows of a table
// that lie close together would lose their digits there. The vectors run along k, so nothing is
// packed or transposed, and every pair is summed in one and the same order.

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/scalars.h"

namespace dive_fast::cpu::DIVE_FAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kQueries = 4, kRows = 6;  // 24 sums in 32 registers
#elif defined(__AVX2__)
constexpr int kBytes = 32, kQueries = 3, kRows = 3;  // 9 sums in 16 registers
#else
constexpr int kBytes = 16, kQueries = 3, kRows = 3;
#endif

template <typename T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <typename T, int bytes>
using Vector = typename VectorOf<T, bytes>::type;

template <typename T>
using Wide = Vector<accumulator<T>, kBytes>;
using Bits = Vector<uint32_t, kBytes>;
using NarrowBits = Vector<uint16_t, kBytes / 2>;

template <typename T>
constexpr int64_t kLanes = kBytes / static_cast<int>(sizeof(accumulator<T>));

template <typename V>
inline V load_as(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

inline Wide<float> load(const float* from) { return load_as<Wide<float>>(from); }
inline Wide<double> load(const double* from) { return load_as<Wide<double>>(from); }
inline Wide<float> load(const BFloat16* from) {
  const Bits bits = __builtin_convertvector(load_as<NarrowBits>(from), Bits);
  return (Wide<float>)(bits << 16);
}
inline Wide<float> load(const Float16* from) {  // as widen(Float16)
  const Bits bits = __builtin_convertvector(load_as<NarrowBits>(from), Bits);
  const Bits magnitude = bits & 0x7fffu;
  const Bits finite = (Bits)((Wide<float>)(magnitude << 13) * 0x1p112f);
  const Bits special = 0x7f800000u | (magnitude << 13);
  const Bits is_special = (Bits)(magnitude >= 0x7c00u);
  const Bits absolute = (special & is_special) | (finite & ~is_special);
  return (Wide<float>)(absolute | ((bits & 0x8000u) << 16));
}

// The last `count` elements of a row, and zeros, which add nothing to either score.
template <typename T>
inline Wide<T> load_tail(const T* from, int64_t count) {
  T padded[kLanes<T>] = {};
  __builtin_memcpy(padded, from, static_cast<std::size_t>(count) * sizeof(T));
  return load(padded);
}

template <typename T, int bytes>
inline T sum_of_lanes(Vector<T, bytes> v) {
  if constexpr (bytes == sizeof(T)) {
    return v[0];
  } else {
    struct Halves {
      Vector<T, bytes / 2> low, high;
    };
    const Halves halves = __builtin_bit_cast(Halves, v);
    return sum_of_lanes<T, bytes / 2>(halves.low + halves.high);
  }
}

template <Metric metric, typename V>
inline void accumulate(V& sum, const V& q, const V& r) {
  if constexpr (metric == Metric::l2) {
    const V difference = q - r;
    sum += difference * difference;
  } else {
    sum += q * r;
  }
}

template <typename T, Metric metric>
void add_tile(const void* const* queries, const void* const* rows, int64_t begin, int64_t end,
              double* scores) {
  using V = Wide<T>;
  V sums[kQueries][kRows] = {};
  const T* q[kQueries];
  const T* r[kRows];
  for (int i = 0; i < kQueries; ++i) q[i] = static_cast<const T*>(queries[i]);
  for (int j = 0; j < kRows; ++j) r[j] = static_cast<const T*>(rows[j]);
  const auto add_step = [&](const auto& load_from) __attribute__((always_inline)) {
    V row[kRows];
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) row[j] = load_from(r[j]);
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      const V query = load_from(q[i]);
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) accumulate<metric>(sums[i][j], query, row[j]);
    }
  };
  int64_t k = begin;
  for (; k + kLanes<T> <= end; k += kLanes<T>) {
    add_step([k](const T* from) __attribute__((always_inline)) { return load(from + k); });
  }
  if (k < end) {
    add_step([k, end](const T* from) { return load_tail(from + k, end - k); });
  }
  for (int i = 0; i < kQueries; ++i) {
    for (int j = 0; j < kRows; ++j) {
      scores[i * kRows + j] += sum_of_lanes<accumulator<T>, kBytes>(sums[i][j]);
    }
  }
}

template <typename T>
double exact_score_of(const T* query, const T* row, int64_t n, Metric metric) {
  double sum = 0;
  if (metric == Metric::l2) {
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) {
      const double difference = double{widen(query[k])} - double{widen(row[k])};
      sum += difference * difference;
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) sum += double{widen(query[k])} * double{widen(row[k])};
  }
  return sum;
}

template <typename Function>
auto with_type(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::float64:
      return function(double{});
    case Dtype::bfloat16:
      return function(BFloat16{});
    case Dtype::float16:
      return function(Float16{});
    default:
      return function(float{});
  }
}

void add_scores(const void* const* queries, const void* const* rows, int64_t begin, int64_t end,
                Dtype dtype, Metric metric, double* scores) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (metric == Metric::l2) {
      add_tile<T, Metric::l2>(queries, rows, begin, end, scores);
    } else {
      add_tile<T, Metric::cosine>(queries, rows, begin, end, scores);
    }
  });
}

double exact_score(const void* query, const void* row, int64_t n, Dtype dtype, Metric metric) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return exact_score_of(static_cast<const T*>(query), static_cast<const T*>(row), n, metric);
  });
}

}  // namespace

extern const SearchKernels search_table;
const SearchKernels search_table = {kQueries, kRows, add_scores, exact_score};

}  // namespace dive_fast::cpu::DIVE_FAST_ISA
