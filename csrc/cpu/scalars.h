// The element types of the CPU kernels, and how they are widened and rounded. Included only by the
// files that are compiled once per instruction set, inside their DIVE_FAST_ISA: internal linkage.
#pragma once

#include <cstdint>

namespace dive_fast::cpu::DIVE_FAST_ISA {
namespace {

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

}  // namespace
}  // namespace dive_fast::cpu::DIVE_FAST_ISA
