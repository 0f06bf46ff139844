// nearest_box on CUDA: one block per box, one thread per column, one launch.
//
//   S[y, x]  = min over y' >= y, x' >= x of cost_br[y', x']          (2-D suffix minimum)
//   cost     = min over y, x of cost_tl[y, x] + S[y + min_height, x + min_width]
//
// Rows are taken from the bottom up: a thread keeps its column's minimum, the block's suffix scan
// of these is a row of S, and no more than that row is ever stored.

#include <tuple>

#include "cuda/device.cuh"

namespace dive_fast::cuda {
namespace {

constexpr int kMostThreads = 1024;

__device__ double infinity() { return __longlong_as_double(0x7ff0000000000000ll); }

// NaN is no cost: such a corner is as good as forbidden.
__device__ double cost_of(double value) { return value < infinity() ? value : infinity(); }

// suffix[x] = min over x' >= x of the threads' values; the whole block calls it.
__device__ void suffix_minimum(double value, double* suffix, double* of_warps) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int step = 1; step < kWarp; step *= 2) {
    const double other = __shfl_down_sync(kWholeWarp, value, step);
    if (lane + step < kWarp && other < value) value = other;
  }
  if (lane == 0) of_warps[warp] = value;
  __syncthreads();
  for (int w = warp + 1; w < blockDim.x / kWarp; ++w) value = fmin(value, of_warps[w]);
  suffix[threadIdx.x] = value;
  __syncthreads();
}

struct Corner {
  double cost;
  int64_t token;
  double other;  // the cost of the bottom-right corner that goes with it
};

// The cheapest, and among equal ones the lowest token; for the whole block.
__device__ Corner best_of_block(Corner corner, Corner* of_warps) {
  const auto better = [](const Corner& a, const Corner& b) {
    return a.cost < b.cost || (a.cost == b.cost && a.token < b.token);
  };
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const Corner other = {__shfl_xor_sync(kWholeWarp, corner.cost, step),
                          __shfl_xor_sync(kWholeWarp, static_cast<long long>(corner.token), step),
                          __shfl_xor_sync(kWholeWarp, corner.other, step)};
    if (better(other, corner)) corner = other;
  }
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = corner;
  __syncthreads();
  corner = of_warps[0];
  for (int w = 1; w < blockDim.x / kWarp; ++w) {
    if (better(of_warps[w], corner)) corner = of_warps[w];
  }
  __syncthreads();
  return corner;
}

template <typename T>
__global__ void nearest_box_kernel(const T* cost_tl,  // [N, G, G]
                                   const T* cost_br,  // [N, G, G]
                                   int64_t grid, int64_t min_height, int64_t min_width,
                                   int64_t* tl,  // [N]
                                   int64_t* br,  // [N]
                                   T* cost) {    // [N]
  __shared__ double suffix[kMostThreads];
  __shared__ double of_warps[kMostThreads / kWarp];
  __shared__ Corner corners[kMostThreads / kWarp];
  const int64_t box = blockIdx.x, x = threadIdx.x;
  cost_tl += box * grid * grid;
  cost_br += box * grid * grid;

  const int64_t last = grid * grid;  // above every token
  double column = infinity();
  Corner best = {infinity(), last, infinity()};
  for (int64_t y = grid - 1; y >= min_height; --y) {
    if (x < grid) column = fmin(column, cost_of(static_cast<double>(cost_br[y * grid + x])));
    suffix_minimum(column, suffix, of_warps);
    if (x + min_width < grid) {
      const int64_t token = (y - min_height) * grid + x;
      const double other = suffix[x + min_width];
      const double total = cost_of(cost_of(static_cast<double>(cost_tl[token])) + other);
      // Rows come from the bottom up, so an equal one is a lower token and wins.
      if (total <= best.cost) best = {total, token, other};
    }
  }
  best = best_of_block(best, corners);

  Corner right = {0, last, 0};
  const int64_t first_y = best.token / grid + min_height, first_x = best.token % grid + min_width;
  if (x >= first_x && x < grid) {
    for (int64_t y = first_y; y < grid; ++y) {
      if (cost_of(static_cast<double>(cost_br[y * grid + x])) == best.other) {
        right.token = y * grid + x;
        break;
      }
    }
  }
  right = best_of_block(right, corners);
  if (x == 0) {
    tl[box] = best.token;
    br[box] = right.token;
    cost[box] = static_cast<T>(best.cost);
  }
}

template <typename T>
void launch(const Tensor& cost_tl, const Tensor& cost_br, int64_t min_height, int64_t min_width,
            Tensor& tl, Tensor& br, Tensor& cost) {
  const int64_t n = cost_tl.size(0), grid = cost_tl.size(1);
  const auto threads = static_cast<unsigned>((grid + kWarp - 1) / kWarp * kWarp);
  nearest_box_kernel<T><<<static_cast<unsigned>(n), threads, 0, current_stream(cost_tl)>>>(
      static_cast<const T*>(cost_tl.const_data_ptr()),
      static_cast<const T*>(cost_br.const_data_ptr()), grid, min_height, min_width,
      static_cast<int64_t*>(tl.mutable_data_ptr()), static_cast<int64_t*>(br.mutable_data_ptr()),
      static_cast<T*>(cost.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// tl, br, cost of the cheapest box that is at least min_height high and min_width wide
std::tuple<Tensor, Tensor, Tensor> nearest_box(const Tensor& cost_tl,  // [N, G, G]
                                               const Tensor& cost_br,  // [N, G, G]
                                               int64_t min_height, int64_t min_width) {
  constexpr const char* op = "nearest_box";
  check_on_device(op, "cost_br", cost_br, cost_tl);
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
  check(grid <= kMostThreads, op, ": G must be at most ", kMostThreads, " on a GPU, but got ",
        grid);
  check(min_height >= 0 && min_height < grid && min_width >= 0 && min_width < grid, op,
        ": min_size must be in [0, ", grid, "), but got (", min_height, ", ", min_width, ")");

  const torch::stable::accelerator::DeviceGuard guard(cost_tl.get_device_index());
  Tensor tl = torch::stable::new_empty(cost_tl, {n}, ScalarType::Long);
  Tensor br = torch::stable::new_empty(cost_tl, {n}, ScalarType::Long);
  Tensor cost = torch::stable::new_empty(cost_tl, {n});
  if (n == 0) return {tl, br, cost};
  const Tensor top_left = torch::stable::contiguous(cost_tl);
  const Tensor bottom_right = torch::stable::contiguous(cost_br);
  if (dtype == ScalarType::Double) {
    launch<double>(top_left, bottom_right, min_height, min_width, tl, br, cost);
  } else {
    launch<float>(top_left, bottom_right, min_height, min_width, tl, br, cost);
  }
  return {tl, br, cost};
}

}  // namespace
}  // namespace dive_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(dive_fast, CUDA, m) {
  m.impl("nearest_box", TORCH_BOX(&dive_fast::cuda::nearest_box));
}
