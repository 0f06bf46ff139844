// noise_prediction_loss, its backward and its spatial map on the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>

#include "checks.h"
#include "cpu/kernels.h"

namespace dive_fast {
namespace {

using torch::headeronly::ScalarType;

// The first `channels` of every row. Only those are copied if the images are not contiguous.
Rows first_channels(const Tensor& prediction, int64_t channels) {
  if (prediction.size(1) == channels) return Rows(prediction);
  Tensor whole = prediction;
  return Rows(torch::stable::narrow(whole, 1, 0, channels));
}

// The arguments that the three ops share, checked and ready to be read row by row.
class LossInputs {
 public:
  LossInputs(const char* op, const Tensor& prediction, const Tensor& noise,
             const Tensor& noise_index, const Tensor& x0, const Tensor& image_index,
             const Tensor& a, const Tensor& s, const std::optional<Tensor>& weight, int64_t target,
             int64_t norm)
      : rows((check_shapes(op, prediction, noise, x0, target, norm), prediction.size(0))),
        channels(noise.size(1)),
        pixels(noise.size(2) * noise.size(3)),
        prediction_dtype(dtype_of(op, "prediction", prediction)),
        noise_index_(op, "noise_index", noise_index, rows, noise.size(0)),
        image_index_(op, "image_index", image_index, rows, x0.size(0)),
        a_(op, "a", a, rows),
        s_(op, "s", s, rows),
        prediction_(first_channels(prediction, channels)),
        noise_(noise),
        x0_(x0),
        data_dtype_(dtype_of(op, "noise", noise)),
        target_(static_cast<cpu::Target>(target)),
        norm_(static_cast<cpu::Norm>(norm)) {
    const bool same = data_dtype_ == prediction_dtype;
    const bool narrow_prediction =
        prediction_dtype == cpu::Dtype::bfloat16 || prediction_dtype == cpu::Dtype::float16;
    check(same || (narrow_prediction && data_dtype_ == cpu::Dtype::float32), op,
          ": noise must have the dtype of prediction, or be float32 beside bfloat16 or float16, "
          "but got ",
          torch::headeronly::toString(noise.scalar_type()));
    check(dtype_of(op, "x0", x0) == data_dtype_, op, ": x0 must have the dtype of noise, but got ",
          torch::headeronly::toString(x0.scalar_type()));
    if (weight) weight_.emplace(op, "weight", *weight, rows);
  }

  cpu::LossRow row(int64_t m, bool stream = false) const {
    return {.prediction = prediction_[m],
            .noise = noise_[noise_index_[m]],
            .x0 = x0_[image_index_[m]],
            .a = a_[m],
            .s = s_[m],
            .channels = channels,
            .pixels = pixels,
            .prediction_dtype = prediction_dtype,
            .data_dtype = data_dtype_,
            .target = target_,
            .norm = norm_,
            .stream = stream};
  }

  double weight(int64_t m) const { return weight_ ? (*weight_)[m] : 1.0; }

  // The dtype of losses and maps.
  ScalarType loss_dtype() const {
    return prediction_dtype == cpu::Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  }

  // Calls `task(m)` for every row, in parallel.
  template <typename Task>
  void for_each_row(const Task& task) const {
    torch::stable::parallel_for(0, rows, rows_per_task(channels * pixels),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t m = begin; m < end; ++m) task(m);
                                });
  }

  const int64_t rows;      // M
  const int64_t channels;  // C
  const int64_t pixels;    // h * w
  const cpu::Dtype prediction_dtype;

 private:
  static void check_shapes(const char* op, const Tensor& prediction, const Tensor& noise,
                           const Tensor& x0, int64_t target, int64_t norm) {
    check_images(op, "prediction", prediction);
    check_images(op, "noise", noise);
    check_images(op, "x0", x0);
    check_same_images(op, "x0", x0, "noise", noise);
    const int64_t c = noise.size(1);
    check(prediction.size(1) == c || prediction.size(1) == 2 * c, op, ": prediction must have ", c,
          " or ", 2 * c, " channels, but got ", prediction.size(1));
    check(prediction.size(2) == noise.size(2) && prediction.size(3) == noise.size(3), op,
          ": prediction must have the [h, w] of noise, [", noise.size(2), ", ", noise.size(3),
          "], but got [", prediction.size(2), ", ", prediction.size(3), "]");
    check(target >= 0 && target < 4, op, ": target must be in [0, 4), but got ", target);
    check(norm >= 0 && norm < 3, op, ": norm must be in [0, 3), but got ", norm);
  }

  Index noise_index_, image_index_;
  Coefficient a_, s_;
  std::optional<Coefficient> weight_;
  Rows prediction_, noise_, x0_;
  cpu::Dtype data_dtype_;
  cpu::Target target_;
  cpu::Norm norm_;
};

// loss[m] = weight[m] * mean over C, h, w of norm(target - prediction)
Tensor noise_prediction_loss(const Tensor& prediction,             // [M, C or 2C, h, w]
                             const Tensor& noise,                  // [N, C, h, w]
                             const Tensor& noise_index,            // [M]
                             const Tensor& x0,                     // [B, C, h, w]
                             const Tensor& image_index,            // [M]
                             const Tensor& a,                      // [M]
                             const Tensor& s,                      // [M]
                             const std::optional<Tensor>& weight,  // [M]
                             int64_t target, int64_t norm) {
  const LossInputs inputs("noise_prediction_loss", prediction, noise, noise_index, x0, image_index,
                          a, s, weight, target, norm);
  Tensor loss = torch::stable::new_empty(prediction, {inputs.rows}, inputs.loss_dtype());
  void* out = loss.mutable_data_ptr();
  const bool is_double = inputs.loss_dtype() == ScalarType::Double;
  const double elements = static_cast<double>(inputs.channels * inputs.pixels);
  const cpu::Kernels& kernels = cpu::kernels();
  inputs.for_each_row([&](int64_t m) {
    const double value = inputs.weight(m) * kernels.loss(inputs.row(m)) / elements;
    if (is_double) {
      static_cast<double*>(out)[m] = value;
    } else {
      static_cast<float*>(out)[m] = static_cast<float>(value);
    }
  });
  return loss;
}

// d loss[m] / d prediction = -weight[m] / (C h w) * norm'(target - prediction), times grad[m]
Tensor noise_prediction_loss_backward(const Tensor& grad,                   // [M]
                                      const Tensor& prediction,             // [M, C or 2C, h, w]
                                      const Tensor& noise,                  // [N, C, h, w]
                                      const Tensor& noise_index,            // [M]
                                      const Tensor& x0,                     // [B, C, h, w]
                                      const Tensor& image_index,            // [M]
                                      const Tensor& a,                      // [M]
                                      const Tensor& s,                      // [M]
                                      const std::optional<Tensor>& weight,  // [M]
                                      int64_t target, int64_t norm) {
  constexpr const char* op = "noise_prediction_loss_backward";
  const LossInputs inputs(op, prediction, noise, noise_index, x0, image_index, a, s, weight, target,
                          norm);
  const Coefficient grad_of(op, "grad", grad, inputs.rows);
  Tensor result = torch::stable::new_empty(
      prediction, {inputs.rows, prediction.size(1), prediction.size(2), prediction.size(3)});
  char* out = static_cast<char*>(result.mutable_data_ptr());
  const int64_t element_size = static_cast<int64_t>(result.element_size());
  const int64_t bytes_read = inputs.channels * inputs.pixels * element_size;
  const int64_t bytes_per_row = prediction.size(1) * inputs.pixels * element_size;
  const double elements = static_cast<double>(inputs.channels * inputs.pixels);
  const bool stream = cpu::should_stream(inputs.rows * bytes_per_row);
  const cpu::Kernels& kernels = cpu::kernels();
  inputs.for_each_row([&](int64_t m) {
    char* gradient = out + m * bytes_per_row;
    const double scale = -grad_of[m] * inputs.weight(m) / elements;
    kernels.loss_gradient(inputs.row(m, stream), scale, gradient);
    std::memset(gradient + bytes_read, 0, static_cast<size_t>(bytes_per_row - bytes_read));
  });
  return result;
}

// map[m] = weight[m] * mean over C of norm(target - prediction), [M, h, w]
Tensor noise_prediction_error_map(const Tensor& prediction,             // [M, C or 2C, h, w]
                                  const Tensor& noise,                  // [N, C, h, w]
                                  const Tensor& noise_index,            // [M]
                                  const Tensor& x0,                     // [B, C, h, w]
                                  const Tensor& image_index,            // [M]
                                  const Tensor& a,                      // [M]
                                  const Tensor& s,                      // [M]
                                  const std::optional<Tensor>& weight,  // [M]
                                  int64_t target, int64_t norm) {
  const LossInputs inputs("noise_prediction_error_map", prediction, noise, noise_index, x0,
                          image_index, a, s, weight, target, norm);
  Tensor map = torch::stable::new_empty(
      prediction, {inputs.rows, prediction.size(2), prediction.size(3)}, inputs.loss_dtype());
  char* out = static_cast<char*>(map.mutable_data_ptr());
  const int64_t bytes_per_row = inputs.pixels * static_cast<int64_t>(map.element_size());
  const double channels = static_cast<double>(inputs.channels);
  const cpu::Kernels& kernels = cpu::kernels();
  inputs.for_each_row([&](int64_t m) {
    kernels.error_map(inputs.row(m), inputs.weight(m) / channels, out + m * bytes_per_row);
  });
  return map;
}

}  // namespace
}  // namespace dive_fast

STABLE_TORCH_LIBRARY_IMPL(dive_fast, CPU, m) {
  m.impl("noise_prediction_loss", TORCH_BOX(&dive_fast::noise_prediction_loss));
  m.impl("noise_prediction_loss_backward", TORCH_BOX(&dive_fast::noise_prediction_loss_backward));
  m.impl("noise_prediction_error_map", TORCH_BOX(&dive_fast::noise_prediction_error_map));
}
