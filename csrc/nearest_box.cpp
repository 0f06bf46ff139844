// nearest_box on the CPU: the exact joint minimum over the valid boxes, O(G^2) for each.
//
//   S[y, x]  = min over y' >= y, x' >= x of cost_br[y', x']          (2-D suffix minimum)
//   cost     = min over y, x of cost_tl[y, x] + S[y + min_height, x + min_width]
//
// Rows are taken from the bottom up, so one row of S at a time is enough.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

namespace dive_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Box {
  int64_t tl, br;  // y * G + x
  double cost;
};

// NaN is no cost: such a corner is as good as forbidden.
inline double cost_of(double value) { return value < kInfinity ? value : kInfinity; }

template <typename T>
Box nearest_box_of(const T* cost_tl, const T* cost_br, int64_t grid, int64_t min_height,
                   int64_t min_width) {
  std::vector<double> column(static_cast<size_t>(grid), kInfinity);  // minimum of rows y and below
  std::vector<double> suffix(static_cast<size_t>(grid), kInfinity);  // S[y]
  Box best = {0, 0, kInfinity};
  double best_corner = kInfinity;
  for (int64_t y = grid - 1; y >= min_height; --y) {
    const T* below = cost_br + y * grid;
    for (int64_t x = 0; x < grid; ++x) {
      const double cost = cost_of(static_cast<double>(below[x]));
      column[x] = cost < column[x] ? cost : column[x];
    }
    double lowest = kInfinity;
    for (int64_t x = grid - 1; x >= 0; --x) {
      lowest = column[x] < lowest ? column[x] : lowest;
      suffix[x] = lowest;
    }
    const int64_t top = y - min_height;
    const T* above = cost_tl + top * grid;
    double row_cost = kInfinity;
    int64_t row_x = 0;
    for (int64_t x = 0; x + min_width < grid; ++x) {
      const double cost = cost_of(cost_of(static_cast<double>(above[x])) + suffix[x + min_width]);
      if (cost < row_cost) {
        row_cost = cost;
        row_x = x;
      }
    }
    // Rows come from the bottom up, so an equal one is a lower token and wins.
    if (row_cost <= best.cost) {
      best = {top * grid + row_x, 0, row_cost};
      best_corner = suffix[row_x + min_width];
    }
  }
  for (int64_t y = best.tl / grid + min_height; y < grid; ++y) {
    for (int64_t x = best.tl % grid + min_width; x < grid; ++x) {
      if (cost_of(static_cast<double>(cost_br[y * grid + x])) == best_corner) {
        best.br = y * grid + x;
        return best;
      }
    }
  }
  return best;  // not reached: best_corner is one of them
}

// tl, br, cost of the cheapest box that is at least min_height high and min_width wide
std::tuple<Tensor, Tensor, Tensor> nearest_box(const Tensor& cost_tl,  // [N, G, G]
                                               const Tensor& cost_br,  // [N, G, G]
                                               int64_t min_height, int64_t min_width) {
  constexpr const char* op = "nearest_box";
  check_on_cpu(op, "cost_tl", cost_tl);
  check_on_cpu(op, "cost_br", cost_br);
  check(cost_tl.dim() == 3 && cost_tl.size(1) == cost_tl.size(2), op,
        ": cost_tl must have shape [N, G, G]");
  check(cost_br.dim() == 3 && cost_br.size(0) == cost_tl.size(0) &&
            cost_br.size(1) == cost_tl.size(1) && cost_br.size(2) == cost_tl.size(1),
        op, ": cost_br must have the shape of cost_tl");
  const ScalarType dtype = cost_tl.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
        ": cost_tl must be float32 or float64, but got ", torch::headeronly::toString(dtype));
  check(cost_br.scalar_type() == dtype, op, ": cost_br must have the dtype of cost_tl, but got ",
        torch::headeronly::toString(cost_br.scalar_type()));
  const int64_t n = cost_tl.size(0), grid = cost_tl.size(1);
  check(min_height >= 0 && min_height < grid && min_width >= 0 && min_width < grid, op,
        ": min_size must be in [0, ", grid, "), but got (", min_height, ", ", min_width, ")");

  Tensor tl = torch::stable::new_empty(cost_tl, {n}, ScalarType::Long);
  Tensor br = torch::stable::new_empty(cost_tl, {n}, ScalarType::Long);
  Tensor cost = torch::stable::new_empty(cost_tl, {n});
  int64_t* tl_out = static_cast<int64_t*>(tl.mutable_data_ptr());
  int64_t* br_out = static_cast<int64_t*>(br.mutable_data_ptr());
  void* cost_out = cost.mutable_data_ptr();
  const Rows tl_rows(cost_tl), br_rows(cost_br);
  const auto solve = [&](auto type, int64_t i) {
    using T = decltype(type);
    const Box box = nearest_box_of(static_cast<const T*>(tl_rows[i]),
                                   static_cast<const T*>(br_rows[i]), grid, min_height, min_width);
    tl_out[i] = box.tl;
    br_out[i] = box.br;
    static_cast<T*>(cost_out)[i] = static_cast<T>(box.cost);
  };
  torch::stable::parallel_for(0, n, rows_per_task(grid * grid), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (dtype == ScalarType::Double) {
        solve(double{}, i);
      } else {
        solve(float{}, i);
      }
    }
  });
  return {tl, br, cost};
}

}  // namespace
}  // namespace dive_fast

STABLE_TORCH_LIBRARY_IMPL(dive_fast, CPU, m) {
  m.impl("nearest_box", TORCH_BOX(&dive_fast::nearest_box));
}
