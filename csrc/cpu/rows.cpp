// One row of every CPU op. Compiled several times, each time with the flags of one instruction set
// and DIVE_FAST_ISA as the namespace. Everything but the table has internal linkage and no library
// template is used: a function compiled for AVX-512 must never be the one that the linker keeps for
// an older processor.
//
// Rows are worked on in blocks that fit in the first-level cache: load (and widen) a block, form
// the residual, then reduce or differentiate it. This keeps the loops few and simple enough for the
// compiler to vectorise, whatever the combination of dtypes, target and norm.

#include <cstdint>

#include "cpu/kernels.h"

namespace dive_fast::cpu::DIVE_FAST_ISA {
namespace {

constexpr int64_t kBlock = 512;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which a dtype is computed.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator = typename Accumulator<T>::type;

inline uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline float widen(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Scaling by 2^112 moves the exponent's bias from 15 to 127, and normalises subnormals.
  const float finite = float_of(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (magnitude << 13);  // infinity and NaN
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  return float_of((magnitude >= 0x7c00u ? special : bits_of(finite)) | sign);
}

inline void store(float* to, float value) { *to = value; }
inline void store(double* to, double value) { *to = value; }

// Round to nearest, ties to even, as torch does.
inline void store(BFloat16* to, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

inline void store(Float16* to, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the subnormal, correctly rounded, in the low bits of the sum.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  to->bits = static_cast<uint16_t>((magnitude >= 0x47800000u ? special : finite) | sign);
}

inline int64_t block_size(int64_t start, int64_t n) {
  return n - start < kBlock ? n - start : kBlock;
}

// x_t = a x0 + s eps
template <typename T>
void q_sample_row(const NoisingRow& row) {
  using Acc = accumulator<T>;
  const T* x0 = static_cast<const T*>(row.x0);
  const T* noise = static_cast<const T*>(row.noise);
  T* __restrict__ x_t = static_cast<T*>(row.x_t);
  const Acc a = static_cast<Acc>(row.a), s = static_cast<Acc>(row.s);
  for (int64_t i = 0; i < row.n; ++i) {
    store(x_t + i, a * widen(x0[i]) + s * widen(noise[i]));
  }
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
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; ++i) sum += residual[i] * residual[i];
      break;
    case Norm::l1:
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; ++i) sum += magnitude_of(residual[i]);
      break;
    case Norm::huber:
#pragma omp simd reduction(+ : sum)
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
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = block_size(start, n);
    form_residual<P, T>(row, start, size, residual);
    store_slopes(row.norm, residual, size, static_cast<Acc>(scale),
                 static_cast<P*>(gradient) + start);
  }
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
  with_types(row, [&](auto p, auto t) {
    error_map_row<decltype(p), decltype(t)>(row, scale, map);
  });
}

}  // namespace

#define DIVE_FAST_STRING_(name) #name
#define DIVE_FAST_STRING(name) DIVE_FAST_STRING_(name)

extern const Kernels table;
const Kernels table = {DIVE_FAST_STRING(DIVE_FAST_ISA), q_sample, loss, loss_gradient, error_map};

}  // namespace dive_fast::cpu::DIVE_FAST_ISA
