// One row of every CPU op. Compiled several times, each time with the flags of one instruction set
// and DIVE_FAST_ISA as the namespace. Everything but the table has internal linkage and no library
// template is used: a function compiled for AVX-512 must never be the one that the linker keeps for
// an older processor.
//
// Rows are worked on in blocks that fit in the first-level cache: load (and widen) a block, form
// the residual, then reduce or differentiate it. This keeps the loops few and simple enough for the
// compiler to vectorise, whatever the combination of dtypes, target and norm.

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"
#include "cpu/scalars.h"

namespace dive_fast::cpu::DIVE_FAST_ISA {
namespace {

constexpr int64_t kBlock = 512;
// Long enough for several vectors: one sum would wait for the addition before.
constexpr int kIndependentSums = 64;

inline int64_t block_size(int64_t start, int64_t n) {
  return n - start < kBlock ? n - start : kBlock;
}

// Copies a finished block past the caches: a result that will not fit there need not first be read
// into them, which a plain store does. Needs an aligned destination, else it is a plain copy.
inline void stream_block(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  using Vector = __m512i;
  const auto store = [](char* at, Vector v) {
    _mm512_stream_si512(reinterpret_cast<Vector*>(at), v);
  };
#elif defined(__AVX2__)
  using Vector = __m256i;
  const auto store = [](char* at, Vector v) {
    _mm256_stream_si256(reinterpret_cast<Vector*>(at), v);
  };
#else
  using Vector = __m128i;
  const auto store = [](char* at, Vector v) { _mm_stream_si128(reinterpret_cast<Vector*>(at), v); };
#endif
  constexpr int64_t size = sizeof(Vector);
  if (reinterpret_cast<uintptr_t>(to) % size == 0 && bytes % size == 0) {
    for (int64_t i = 0; i < bytes; i += size) {
      Vector v;
      __builtin_memcpy(&v, from + i, size);
      store(to + i, v);
    }
    return;
  }
#endif
  __builtin_memcpy(to, from, static_cast<std::size_t>(bytes));
}

// Streamed stores are not ordered with the others; the row's reader may be on another core.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Calls `compute(block, start, size)` for every block of `out` [n], which is written directly or,
// if `stream`, by way of a buffer.
template <typename T, typename Compute>
void write_blocks(T* out, int64_t n, bool stream, const Compute& compute) {
  if (!stream) {
    for (int64_t start = 0; start < n; start += kBlock) {
      compute(out + start, start, block_size(start, n));
    }
    return;
  }
  alignas(64) T block[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = block_size(start, n);
    compute(block, start, size);
    stream_block(reinterpret_cast<char*>(out + start), reinterpret_cast<const char*>(block),
                 size * static_cast<int64_t>(sizeof(T)));
  }
  finish_streaming();
}

// x_t = a x0 + s eps
template <typename T>
void q_sample_row(const NoisingRow& row) {
  using Acc = accumulator<T>;
  const T* x0 = static_cast<const T*>(row.x0);
  const T* noise = static_cast<const T*>(row.noise);
  const Acc a = static_cast<Acc>(row.a), s = static_cast<Acc>(row.s);
  write_blocks(static_cast<T*>(row.x_t), row.n, row.stream,
               [=](T* __restrict__ x_t, int64_t start, int64_t size) {
                 for (int64_t i = 0; i < size; ++i) {
                   store(x_t + i, a * widen(x0[start + i]) + s * widen(noise[start + i]));
                 }
               });
}

// residual[i] = target[start + i] - prediction[start + i], for `size` elements
template <typename P, typename T, typename Acc>
void form_residual(const LossRow& row, int64_t start, int64_t size, Acc* __restrict__ residual) {
  const P* prediction = static_cast<const P*>(row.prediction) + start;
  const T* noise = static_cast<const T*>(row.noise) + start;
  const T* x0 = static_cast<const T*>(row.x0) + start;
  const Acc a = static_cast<Acc>(row.a), s = static_cast<Acc>(row.s);
  switch (row.target) {
    case Target::epsilon:
      for (int64_t i = 0; i < size; ++i) {
        residual[i] = widen(noise[i]) - widen(prediction[i]);
      }
      break;
    case Target::v_prediction:  // v = a_t eps - s_t x0
      for (int64_t i = 0; i < size; ++i) {
        residual[i] = a * widen(noise[i]) - s * widen(x0[i]) - widen(prediction[i]);
      }
      break;
    case Target::sample:
      for (int64_t i = 0; i < size; ++i) {
        residual[i] = widen(x0[i]) - widen(prediction[i]);
      }
      break;
    case Target::flow:
      for (int64_t i = 0; i < size; ++i) {
        residual[i] = widen(noise[i]) - widen(x0[i]) - widen(prediction[i]);
      }
      break;
  }
}

template <typename Acc>
inline Acc magnitude_of(Acc r) {
  return r < 0 ? -r : r;
}

template <typename Acc>
inline Acc huber(Acc r) {
  const Acc magnitude = magnitude_of(r);
  return magnitude < 1 ? Acc(0.5) * r * r : magnitude - Acc(0.5);
}

template <typename Acc>
inline Acc clamp_to_one(Acc r) {
  return r < -1 ? Acc(-1) : (r > 1 ? Acc(1) : r);
}

// Sum of norm(r) over one block. The sum of a block stays short enough for fp32; blocks are added
// in fp64 by the caller.
template <typename Acc>
Acc sum_of_errors(Norm norm, const Acc* residual, int64_t size) {
  Acc sum = 0;
  switch (norm) {
    case Norm::l2:
#pragma omp simd reduction(+ : sum) simdlen(kIndependentSums)
      for (int64_t i = 0; i < size; ++i) sum += residual[i] * residual[i];
      break;
    case Norm::l1:
#pragma omp simd reduction(+ : sum) simdlen(kIndependentSums)
      for (int64_t i = 0; i < size; ++i) sum += magnitude_of(residual[i]);
      break;
    case Norm::huber:
#pragma omp simd reduction(+ : sum) simdlen(kIndependentSums)
      for (int64_t i = 0; i < size; ++i) sum += huber(residual[i]);
      break;
  }
  return sum;
}

// map[i] += norm(r[i])
template <typename Acc>
void add_errors(Norm norm, const Acc* residual, int64_t size, Acc* __restrict__ map) {
  switch (norm) {
    case Norm::l2:
      for (int64_t i = 0; i < size; ++i) map[i] += residual[i] * residual[i];
      break;
    case Norm::l1:
      for (int64_t i = 0; i < size; ++i) map[i] += magnitude_of(residual[i]);
      break;
    case Norm::huber:
      for (int64_t i = 0; i < size; ++i) map[i] += huber(residual[i]);
      break;
  }
}

// gradient[i] = scale * norm'(r[i])
template <typename P, typename Acc>
void store_slopes(Norm norm, const Acc* residual, int64_t size, Acc scale,
                  P* __restrict__ gradient) {
  switch (norm) {
    case Norm::l2:
      for (int64_t i = 0; i < size; ++i) store(gradient + i, scale * (2 * residual[i]));
      break;
    case Norm::l1:
      for (int64_t i = 0; i < size; ++i) {
        const Acc sign = residual[i] > 0 ? Acc(1) : (residual[i] < 0 ? Acc(-1) : Acc(0));
        store(gradient + i, scale * sign);
      }
      break;
    case Norm::huber:
      for (int64_t i = 0; i < size; ++i) {
        store(gradient + i, scale * clamp_to_one(residual[i]));
      }
      break;
  }
}

template <typename P, typename T>
double loss_row(const LossRow& row) {
  using Acc = accumulator<P>;
  alignas(64) Acc residual[kBlock];
  const int64_t n = row.channels * row.pixels;
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = block_size(start, n);
    form_residual<P, T>(row, start, size, residual);
    total += sum_of_errors(row.norm, residual, size);
  }
  return total;
}

template <typename P, typename T>
void loss_gradient_row(const LossRow& row, double scale, void* gradient) {
  using Acc = accumulator<P>;
  alignas(64) Acc residual[kBlock];
  const int64_t n = row.channels * row.pixels;
  write_blocks(static_cast<P*>(gradient), n, row.stream,
               [&](P* block, int64_t start, int64_t size) {
                 form_residual<P, T>(row, start, size, residual);
                 store_slopes(row.norm, residual, size, static_cast<Acc>(scale), block);
               });
}

template <typename P, typename T>
void error_map_row(const LossRow& row, double scale, void* map) {
  using Acc = accumulator<P>;
  alignas(64) Acc residual[kBlock];
  Acc* out = static_cast<Acc*>(map);
  for (int64_t p = 0; p < row.pixels; ++p) out[p] = 0;
  for (int64_t c = 0; c < row.channels; ++c) {
    for (int64_t start = 0; start < row.pixels; start += kBlock) {
      const int64_t size = block_size(start, row.pixels);
      form_residual<P, T>(row, c * row.pixels + start, size, residual);
      add_errors(row.norm, residual, size, out + start);
    }
  }
  for (int64_t p = 0; p < row.pixels; ++p) out[p] *= static_cast<Acc>(scale);
}

void q_sample(const NoisingRow& row) {
  switch (row.dtype) {
    case Dtype::float64:
      return q_sample_row<double>(row);
    case Dtype::float32:
      return q_sample_row<float>(row);
    case Dtype::bfloat16:
      return q_sample_row<BFloat16>(row);
    case Dtype::float16:
      return q_sample_row<Float16>(row);
  }
}

// Calls `function(P{}, T{})` with the types of the row's prediction and data: the same, or narrow
// predictions beside fp32 data.
template <typename Function>
auto with_types(const LossRow& row, const Function& function) {
  const bool wide_data = row.data_dtype == Dtype::float32;
  switch (row.prediction_dtype) {
    case Dtype::float64:
      return function(double{}, double{});
    case Dtype::bfloat16:
      return wide_data ? function(BFloat16{}, float{}) : function(BFloat16{}, BFloat16{});
    case Dtype::float16:
      return wide_data ? function(Float16{}, float{}) : function(Float16{}, Float16{});
    default:
      return function(float{}, float{});
  }
}

double loss(const LossRow& row) {
  return with_types(row, [&](auto p, auto t) { return loss_row<decltype(p), decltype(t)>(row); });
}

void loss_gradient(const LossRow& row, double scale, void* gradient) {
  with_types(row, [&](auto p, auto t) {
    loss_gradient_row<decltype(p), decltype(t)>(row, scale, gradient);
  });
}

void error_map(const LossRow& row, double scale, void* map) {
  with_types(row,
             [&](auto p, auto t) { error_map_row<decltype(p), decltype(t)>(row, scale, map); });
}

}  // namespace

#define DIVE_FAST_STRING_(name) #name
#define DIVE_FAST_STRING(name) DIVE_FAST_STRING_(name)

extern const Kernels table;
const Kernels table = {DIVE_FAST_STRING(DIVE_FAST_ISA), q_sample, loss, loss_gradient, error_map};

}  // namespace dive_fast::cpu::DIVE_FAST_ISA
