// nearest_row on CUDA: one launch that tiles queries against rows, folds the argmin in, and lets
// the last block of every query tile choose among the chunks of the table.

// A range outside the table must stop the kernel in release builds, too.
#undef NDEBUG
#include <cassert>
#include <optional>
#include <tuple>

#include "cuda/device.cuh"

namespace dive_fast::cuda {
namespace {

constexpr int kTileQueries = 32, kTileRows = 128;  // of one block
constexpr int kDepth = 16;                         // elements of D in shared memory at a time
constexpr int kPerThread = 4;                      // queries, and rows, of one thread
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFlush = 512;  // elements of D that one fp32 sum runs over before it is put aside
static_assert(kWarps * kPerThread == kTileQueries && kWarp * kPerThread == kTileRows);

struct Problem {
  const void* v;                       // [N, D], rows v_stride apart
  const void* table;                   // [V, D], rows table_stride apart
  const int64_t* allowed;              // [N, 2] or null
  const int64_t* extra;                // [E] or null
  int64_t queries, rows, dim, extras;  // N, V, D, E
  int64_t v_stride, table_stride;
  double* chunk_keys;   // [chunks, N]
  int64_t* chunk_rows;  // [chunks, N]
  int32_t* tickets;     // [query tiles], zero before the launch
  int64_t* index;       // [N]
  void* distance;       // [N]

  __device__ int64_t start(int64_t n) const { return allowed ? allowed[2 * n] : 0; }
  __device__ int64_t stop(int64_t n) const { return allowed ? allowed[2 * n + 1] : rows; }
};

// The best row so far: lower keys win, and among equal keys lower rows. Only finite keys are
// offered: NaN is no distance, and what is too large for a sum is infinitely far.
struct Best {
  double key;
  int64_t row;

  __device__ void offer(double other_key, int64_t other_row) {
    if (other_row >= 0 && (other_key < key || (other_key == key && other_row < row))) {
      key = other_key;
      row = other_row;
    }
  }
};

__device__ Best none() { return {__longlong_as_double(0x7ff0000000000000ll), -1}; }

__device__ Best best_of_warp(Best best) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double key = __shfl_xor_sync(kWholeWarp, best.key, step);
    const int64_t row = __shfl_xor_sync(kWholeWarp, static_cast<long long>(best.row), step);
    if (best.row < 0) {
      best = {key, row};
    } else {
      best.offer(key, row);
    }
  }
  return best;
}

// Keys of one tile of queries against kTileRows rows. A warp holds kPerThread queries, and its
// lanes hold the rows lane, lane + 32, ...; every pair is summed in the order of k, so equal rows
// tie.
template <typename T, cpu::Metric metric, typename RowOf, typename Offer>
__device__ void search_tile(const Problem& p, int64_t first_query, const RowOf& row_of,
                            const Offer& offer) {
  using Acc = typename Accumulator<T>::type;
  __shared__ Acc queries[kDepth][kTileQueries + 1];
  __shared__ Acc rows[kDepth][kTileRows + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Acc total[kPerThread][kPerThread] = {}, sum[kPerThread][kPerThread] = {};
  Acc square_total[kPerThread] = {}, square[kPerThread] = {};
  for (int64_t k0 = 0; k0 < p.dim; k0 += kDepth) {
    __syncthreads();
    for (int i = threadIdx.x; i < kTileQueries * kDepth; i += kThreads) {
      const int64_t n = first_query + i / kDepth, k = k0 + i % kDepth;
      const bool inside = n < p.queries && k < p.dim;
      queries[i % kDepth][i / kDepth] =
          inside ? widen(static_cast<const T*>(p.v)[n * p.v_stride + k]) : Acc(0);
    }
    for (int i = threadIdx.x; i < kTileRows * kDepth; i += kThreads) {
      const int64_t r = row_of(i / kDepth), k = k0 + i % kDepth;
      const bool inside = r >= 0 && k < p.dim;
      rows[i % kDepth][i / kDepth] =
          inside ? widen(static_cast<const T*>(p.table)[r * p.table_stride + k]) : Acc(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      Acc q[kPerThread], r[kPerThread];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) q[i] = queries[k][warp * kPerThread + i];
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) r[j] = rows[k][lane + j * kWarp];
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        if constexpr (metric == cpu::Metric::cosine) square[j] += r[j] * r[j];
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          if constexpr (metric == cpu::Metric::l2) {
            // From differences: |q|^2 - 2 q.r + |r|^2 cancels digits when rows lie close together.
            const Acc difference = q[i] - r[j];
            sum[i][j] += difference * difference;
          } else {
            sum[i][j] += q[i] * r[j];
          }
        }
      }
    }
    if ((k0 + kDepth) % kFlush == 0) {
      for (int j = 0; j < kPerThread; ++j) {
        square_total[j] += square[j];
        square[j] = 0;
        for (int i = 0; i < kPerThread; ++i) {
          total[i][j] += sum[i][j];
          sum[i][j] = 0;
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t row = row_of(lane + j * kWarp);
    if (row < 0) continue;
    double scale = 1;
    if constexpr (metric == cpu::Metric::cosine) {
      const double norm = sqrt(static_cast<double>(square_total[j] + square[j]));
      if (!isfinite(norm)) continue;
      scale = norm == 0 ? 0.0 : -1.0 / norm;  // |q| is common to all rows and left out
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const double key = static_cast<double>(total[i][j] + sum[i][j]) * scale;
      if (isfinite(key)) offer(i, row, key);
    }
  }
}

// Sum over k of a(k), by one warp.
template <typename Term>
__device__ double sum_of_warp(int64_t n, const Term& term) {
  double sum = 0;
  for (int64_t k = threadIdx.x % kWarp; k < n; k += kWarp) sum += term(k);
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  return sum;
}

// The Euclidean distance, or 1 - cosine similarity, in fp64, by one warp.
template <typename T, cpu::Metric metric>
__device__ double distance_of(const Problem& p, int64_t n, int64_t row) {
  const T* q = static_cast<const T*>(p.v) + n * p.v_stride;
  const T* r = static_cast<const T*>(p.table) + row * p.table_stride;
  const auto at = [](const T* from, int64_t k) { return static_cast<double>(widen(from[k])); };
  if constexpr (metric == cpu::Metric::l2) {
    return sqrt(sum_of_warp(p.dim, [&](int64_t k) {
      const double difference = at(q, k) - at(r, k);
      return difference * difference;
    }));
  } else {
    const double dot = sum_of_warp(p.dim, [&](int64_t k) { return at(q, k) * at(r, k); });
    const double q_square = sum_of_warp(p.dim, [&](int64_t k) { return at(q, k) * at(q, k); });
    const double r_square = sum_of_warp(p.dim, [&](int64_t k) { return at(r, k) * at(r, k); });
    const double product = sqrt(q_square) * sqrt(r_square);
    return product == 0 ? 1.0 : 1.0 - dot / product;
  }
}

// Chooses among the chunks for one query, by one warp.
template <typename T, cpu::Metric metric>
__device__ void finish_query(const Problem& p, int64_t n, int64_t chunks) {
  const int lane = threadIdx.x % kWarp;
  Best best = none();
  for (int64_t chunk = lane; chunk < chunks; chunk += kWarp) {
    // Written by other blocks: past the first-level cache.
    const Best other = {
        __ldcg(p.chunk_keys + chunk * p.queries + n),
        __ldcg(reinterpret_cast<const long long*>(p.chunk_rows) + chunk * p.queries + n)};
    best.row < 0 ? void(best = other) : best.offer(other.key, other.row);
  }
  best = best_of_warp(best);
  if (best.row < 0) {  // nothing at a finite distance: the lowest row that is allowed
    best.row = p.start(n) < p.stop(n) ? p.start(n) : p.rows;
    for (int64_t e = 0; e < p.extras; ++e) best.row = min(best.row, p.extra[e]);
    assert(best.row < p.rows && "nearest_row: allowed must leave every query a row");
  }
  const double distance = distance_of<T, metric>(p, n, best.row);
  if (lane == 0) {
    p.index[n] = best.row;
    static_cast<typename Accumulator<T>::type*>(p.distance)[n] = distance;
  }
}

// Block (tile, chunk): the queries of one tile against one chunk of the table.
template <typename T, cpu::Metric metric>
__global__ void __launch_bounds__(kThreads) nearest_row_kernel(Problem p) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first_query = static_cast<int64_t>(blockIdx.x) * kTileQueries;
  const int64_t chunks = gridDim.y, chunk = blockIdx.y;
  const int64_t tiles = (p.rows + kTileRows - 1) / kTileRows;

  int64_t start[kPerThread], stop[kPerThread];
  Best best[kPerThread];
  int64_t lowest = p.rows, highest = 0;  // the rows that any query of the block may take
  for (int i = 0; i < kTileQueries; ++i) {
    const int64_t n = first_query + i;
    if (n >= p.queries) break;
    assert(p.start(n) >= 0 && p.start(n) <= p.stop(n) && p.stop(n) <= p.rows &&
           "nearest_row: allowed must be ranges within the table");
    if (p.start(n) == p.stop(n)) continue;
    lowest = min(lowest, p.start(n));
    highest = max(highest, p.stop(n));
  }
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t n = first_query + warp * kPerThread + i;
    start[i] = n < p.queries ? p.start(n) : 0;
    stop[i] = n < p.queries ? p.stop(n) : 0;
    best[i] = none();
  }
  for (int64_t tile = tiles * chunk / chunks; tile < tiles * (chunk + 1) / chunks; ++tile) {
    const int64_t first = tile * kTileRows;
    if (first >= highest || first + kTileRows <= lowest) continue;
    search_tile<T, metric>(
        p, first_query, [&](int j) { return first + j < p.rows ? first + j : int64_t{-1}; },
        [&](int i, int64_t row, double key) {
          if (row >= start[i] && row < stop[i]) best[i].offer(key, row);
        });
  }
  if (chunk == 0) {
    for (int64_t first = 0; first < p.extras; first += kTileRows) {
      search_tile<T, metric>(
          p, first_query,
          [&](int j) {
            if (first + j >= p.extras) return int64_t{-1};
            const int64_t row = p.extra[first + j];
            assert(row >= 0 && row < p.rows && "nearest_row: extra must be in the table");
            return row;
          },
          [&](int i, int64_t row, double key) { best[i].offer(key, row); });
    }
  }
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t n = first_query + warp * kPerThread + i;
    const Best found = best_of_warp(best[i]);
    if (lane == 0 && n < p.queries) {
      p.chunk_keys[chunk * p.queries + n] = found.key;
      p.chunk_rows[chunk * p.queries + n] = found.row;
    }
  }

  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(p.tickets + blockIdx.x, 1) == chunks - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t n = first_query + warp * kPerThread + i;
    if (n < p.queries) finish_query<T, metric>(p, n, chunks);
  }
}

template <typename T>
void launch(const Problem& problem, cpu::Metric metric, dim3 grid, cudaStream_t stream) {
  if (metric == cpu::Metric::l2) {
    nearest_row_kernel<T, cpu::Metric::l2><<<grid, kThreads, 0, stream>>>(problem);
  } else {
    nearest_row_kernel<T, cpu::Metric::cosine><<<grid, kThreads, 0, stream>>>(problem);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Enough blocks for every multiprocessor, none with less than two tiles of rows.
int64_t chunks_for(int64_t query_tiles, int64_t rows, int32_t device) {
  int processors = 1;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t wanted = (4 * processors + query_tiles - 1) / query_tiles;
  const int64_t most = (rows + 2 * kTileRows - 1) / (2 * kTileRows);
  return std::max<int64_t>(1, std::min<int64_t>({wanted, most, 65535}));
}

// index[n] = argmin over allowed r of distance(v[n], table[r])
std::tuple<Tensor, Tensor> nearest_row(const Tensor& v,                       // [N, D]
                                       const Tensor& table,                   // [V, D]
                                       const std::optional<Tensor>& allowed,  // [N, 2]
                                       const std::optional<Tensor>& extra,    // [E]
                                       int64_t metric) {
  constexpr const char* op = "nearest_row";
  check_on_device(op, "table", table, v);
  check(v.dim() == 2, op, ": v must have shape [N, D], but got ", v.dim(), " dimensions");
  check(table.dim() == 2 && table.size(1) == v.size(1), op, ": table must have shape [V, ",
        v.size(1), "], but got ", table.dim(), " dimensions");
  const cpu::Dtype dtype = dtype_of(op, "v", v);
  check(dtype_of(op, "table", table) == dtype, op, ": table must have the dtype of v, but got ",
        torch::headeronly::toString(table.scalar_type()));
  check(metric == 0 || metric == 1, op, ": metric must be in [0, 2), but got ", metric);
  const torch::stable::accelerator::DeviceGuard guard(v.get_device_index());
  const int64_t n = v.size(0);
  Tensor index = torch::stable::new_empty(v, {n}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(
      v, {n}, dtype == cpu::Dtype::float64 ? ScalarType::Double : ScalarType::Float);
  if (n == 0) return {index, distance};
  check(table.size(0) > 0, op, ": table must have at least one row, but got none");

  std::optional<Tensor> ranges, extras;
  if (allowed) {
    check_on_device(op, "allowed", *allowed, v);
    check(allowed->dim() == 2 && allowed->size(0) == n && allowed->size(1) == 2 &&
              allowed->scalar_type() == ScalarType::Long,
          op, ": allowed must be int64 of shape [", n, ", 2]");
    ranges = torch::stable::contiguous(*allowed);
  }
  if (extra) {
    check_on_device(op, "extra", *extra, v);
    check(extra->dim() == 1 && extra->scalar_type() == ScalarType::Long, op,
          ": extra must be int64 of shape [E]");
    extras = torch::stable::contiguous(*extra);
  }
  const auto rows_of = [](const Tensor& tensor) {
    const bool ready = tensor.size(1) == 1 || tensor.stride(1) == 1;
    return ready ? tensor : torch::stable::contiguous(tensor);
  };
  const Tensor queries = rows_of(v), rows = rows_of(table);
  const int64_t tiles = (n + kTileQueries - 1) / kTileQueries;
  const int64_t chunks = chunks_for(tiles, table.size(0), v.get_device_index());
  Tensor keys = torch::stable::new_empty(v, {chunks, n}, ScalarType::Double);
  Tensor best = torch::stable::new_empty(v, {chunks, n}, ScalarType::Long);
  Tensor tickets = torch::stable::new_zeros(v, {tiles}, ScalarType::Int);
  const Problem problem = {
      .v = queries.const_data_ptr(),
      .table = rows.const_data_ptr(),
      .allowed = ranges ? static_cast<const int64_t*>(ranges->const_data_ptr()) : nullptr,
      .extra = extras ? static_cast<const int64_t*>(extras->const_data_ptr()) : nullptr,
      .queries = n,
      .rows = table.size(0),
      .dim = v.size(1),
      .extras = extras ? extras->numel() : 0,
      .v_stride = queries.stride(0),
      .table_stride = rows.stride(0),
      .chunk_keys = static_cast<double*>(keys.mutable_data_ptr()),
      .chunk_rows = static_cast<int64_t*>(best.mutable_data_ptr()),
      .tickets = static_cast<int32_t*>(tickets.mutable_data_ptr()),
      .index = static_cast<int64_t*>(index.mutable_data_ptr()),
      .distance = distance.mutable_data_ptr(),
  };
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(chunks));
  const cudaStream_t stream = current_stream(v);
  const auto code = static_cast<cpu::Metric>(metric);
  switch (dtype) {
    case cpu::Dtype::float64:
      launch<double>(problem, code, grid, stream);
      break;
    case cpu::Dtype::float32:
      launch<float>(problem, code, grid, stream);
      break;
    case cpu::Dtype::bfloat16:
      launch<__nv_bfloat16>(problem, code, grid, stream);
      break;
    case cpu::Dtype::float16:
      launch<__half>(problem, code, grid, stream);
      break;
  }
  return {index, distance};
}

}  // namespace
}  // namespace dive_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(dive_fast, CUDA, m) {
  m.impl("nearest_row", TORCH_BOX(&dive_fast::cuda::nearest_row));
}
