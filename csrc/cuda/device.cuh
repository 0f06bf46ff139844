// What the CUDA ops share: checks of devices, the current stream, and how numbers are read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "checks.h"

namespace dive_fast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;

inline void check_on_device(const char* op, const char* name, const Tensor& tensor,
                            const Tensor& first) {
  check(tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(), op, ": ", name,
        " must be on the GPU of the first argument, ", first.get_device_index(),
        ", but is on another device");
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

// The type in which a dtype is computed.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

}  // namespace dive_fast::cuda
