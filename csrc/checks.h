// What every CPU op checks before it touches memory. The public Python functions check more, and
// say more; these keep a direct call of torch.ops.dive_fast.* from reading out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "cpu/kernels.h"

namespace dive_fast {

using torch::stable::Tensor;

// Rows per task of parallel_for, so that a task moves at least some 32K elements.
inline int64_t rows_per_task(int64_t elements_per_row) {
  constexpr int64_t kElementsPerTask = 32768;
  return elements_per_row < kElementsPerTask ? kElementsPerTask / (elements_per_row + 1) + 1 : 1;
}

template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());  // ValueError in Python
}

inline cpu::Dtype dtype_of(const char* op, const char* name, const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return cpu::Dtype::float64;
    case ScalarType::Float:
      return cpu::Dtype::float32;
    case ScalarType::BFloat16:
      return cpu::Dtype::bfloat16;
    case ScalarType::Half:
      return cpu::Dtype::float16;
    default:
      check(false, op, ": ", name, " must be float64, float32, bfloat16 or float16, but got ",
            torch::headeronly::toString(tensor.scalar_type()));
      return cpu::Dtype::float32;
  }
}

inline void check_on_cpu(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_cpu(), op, ": ", name, " must be on the CPU, but is on another device");
}

inline void check_images(const char* op, const char* name, const Tensor& tensor) {
  check_on_cpu(op, name, tensor);
  check(tensor.dim() == 4, op, ": ", name, " must have shape [rows, C, h, w], but got ",
        tensor.dim(), " dimensions");
}

inline void check_same_images(const char* op, const char* name, const Tensor& tensor,
                              const char* other_name, const Tensor& other) {
  for (int64_t d = 1; d < 4; ++d) {
    check(tensor.size(d) == other.size(d), op, ": ", name, " must have the [C, h, w] of ",
          other_name, ", but got ", tensor.size(d), " instead of ", other.size(d), " in dimension ",
          d);
  }
}

inline void check_rows(const char* op, const char* name, const Tensor& tensor, int64_t rows) {
  check_on_cpu(op, name, tensor);
  check(tensor.dim() == 1 && tensor.size(0) == rows, op, ": ", name, " must have shape [", rows,
        "], but got ", tensor.dim(), " dimensions and ", tensor.numel(), " elements");
}

// Indices into [0, limit), checked once, read without a copy.
class Index {
 public:
  Index(const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t limit)
      : tensor_(torch::stable::contiguous(tensor)) {
    check_rows(op, name, tensor, rows);
    check(tensor.scalar_type() == torch::headeronly::ScalarType::Long, op, ": ", name,
          " must be int64, but got ", torch::headeronly::toString(tensor.scalar_type()));
    data_ = static_cast<const int64_t*>(tensor_.const_data_ptr());
    for (int64_t m = 0; m < rows; ++m) {
      if (data_[m] >= 0 && data_[m] < limit) continue;
      std::ostringstream message;
      message << op << ": " << name << " must be in [0, " << limit << "), but got " << data_[m]
              << " at position " << m;
      throw std::out_of_range(message.str());  // IndexError in Python
    }
  }
  int64_t operator[](int64_t m) const { return data_[m]; }

 private:
  Tensor tensor_;
  const int64_t* data_;
};

// A factor per row, fp32 or fp64.
class Coefficient {
 public:
  Coefficient(const char* op, const char* name, const Tensor& tensor, int64_t rows)
      : tensor_(torch::stable::contiguous(tensor)) {
    check_rows(op, name, tensor, rows);
    const cpu::Dtype dtype = dtype_of(op, name, tensor);
    is_double_ = dtype == cpu::Dtype::float64;
    check(is_double_ || dtype == cpu::Dtype::float32, op, ": ", name,
          " must be float32 or float64, but got ",
          torch::headeronly::toString(tensor.scalar_type()));
    data_ = tensor_.const_data_ptr();
  }
  double operator[](int64_t m) const {
    return is_double_ ? static_cast<const double*>(data_)[m] : static_cast<const float*>(data_)[m];
  }

 private:
  Tensor tensor_;
  const void* data_;
  bool is_double_;
};

// Rows of contiguous elements ([C, h, w] images, [D] embeddings, [G, G] maps), any number of
// elements apart: a tensor whose rows are not contiguous is copied, a mere slice of them is not.
class Rows {
 public:
  explicit Rows(const Tensor& tensor)
      : tensor_(has_contiguous_rows(tensor) ? tensor : torch::stable::contiguous(tensor)),
        data_(static_cast<const char*>(tensor_.const_data_ptr())),
        bytes_per_row_(tensor_.stride(0) * static_cast<int64_t>(tensor_.element_size())) {}
  const void* operator[](int64_t row) const { return data_ + row * bytes_per_row_; }

 private:
  static bool has_contiguous_rows(const Tensor& tensor) {
    int64_t expected = 1;
    for (int64_t d = tensor.dim() - 1; d > 0; --d) {
      if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
      expected *= tensor.size(d);
    }
    return true;
  }

  Tensor tensor_;
  const char* data_;
  int64_t bytes_per_row_;
};

}  // namespace dive_fast
