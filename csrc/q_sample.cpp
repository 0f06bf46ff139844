// q_sample on the CPU: checks, allocation, and one task per group of rows.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "cpu/kernels.h"

namespace dive_fast {
namespace {

// x_t[m] = a[m] x0[image_index[m]] + s[m] noise[noise_index[m]]
Tensor q_sample(const Tensor& x0,           // [B, C, h, w]
                const Tensor& image_index,  // [M]
                const Tensor& noise,        // [N, C, h, w]
                const Tensor& noise_index,  // [M]
                const Tensor& a,            // [M]
                const Tensor& s) {          // [M]
  constexpr const char* op = "q_sample";
  check_images(op, "x0", x0);
  check_images(op, "noise", noise);
  check_same_images(op, "noise", noise, "x0", x0);
  const cpu::Dtype dtype = dtype_of(op, "x0", x0);
  check(dtype_of(op, "noise", noise) == dtype, op, ": noise must have the dtype of x0, but got ",
        torch::headeronly::toString(noise.scalar_type()));
  const int64_t rows = image_index.numel();
  const Index image(op, "image_index", image_index, rows, x0.size(0));
  const Index probe(op, "noise_index", noise_index, rows, noise.size(0));
  const Coefficient a_of(op, "a", a, rows), s_of(op, "s", s, rows);

  const Rows x0_rows(x0), noise_rows(noise);
  const int64_t n = x0.size(1) * x0.size(2) * x0.size(3);
  Tensor x_t = torch::stable::new_empty(x0, {rows, x0.size(1), x0.size(2), x0.size(3)});
  char* out = static_cast<char*>(x_t.mutable_data_ptr());
  const int64_t bytes_per_row = n * static_cast<int64_t>(x_t.element_size());
  const bool stream = cpu::should_stream(rows * bytes_per_row);
  const cpu::Kernels& kernels = cpu::kernels();
  torch::stable::parallel_for(0, rows, rows_per_task(n), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      kernels.q_sample({.x0 = x0_rows[image[m]],
                        .noise = noise_rows[probe[m]],
                        .x_t = out + m * bytes_per_row,
                        .a = a_of[m],
                        .s = s_of[m],
                        .n = n,
                        .dtype = dtype,
                        .stream = stream});
    }
  });
  return x_t;
}

}  // namespace
}  // namespace dive_fast

STABLE_TORCH_LIBRARY_IMPL(dive_fast, CPU, m) {
  m.impl("q_sample", TORCH_BOX(&dive_fast::q_sample));
}
