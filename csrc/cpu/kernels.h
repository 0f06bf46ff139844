// The row kernels of the CPU ops, compiled once per instruction set (rows.cpp, search.cpp) and
// chosen at run time (dispatch.cpp), so that one binary runs on any processor.
//
// Rows are handed over as untyped pointers: a switch on the dtype once per row costs nothing beside
// the row, and keeps this interface free of templates and of torch.
#pragma once

#include <cstdint>

namespace dive_fast::cpu {

enum class Dtype : int { float64, float32, bfloat16, float16 };

// Codes as in dive_fast/ops/_noise_prediction_loss.py (TARGETS, NORMS).
enum class Target : int { epsilon, v_prediction, sample, flow };
enum class Norm : int { l2, l1, huber };

struct NoisingRow {
  const void* x0;     // [n]
  const void* noise;  // [n]
  void* x_t;          // [n]
  double a, s;
  int64_t n;    // C * h * w
  Dtype dtype;  // of all three
  bool stream;  // past the caches
};

struct LossRow {
  const void* prediction;  // [C * h * w], the channels that are read
  const void* noise;       // [C * h * w]
  const void* x0;          // [C * h * w]
  double a, s;
  int64_t channels, pixels;  // C, h * w
  Dtype prediction_dtype;
  Dtype data_dtype;  // of noise and x0
  Target target;
  Norm norm;
  bool stream;  // the gradient, past the caches
};

// Whether a result of so many bytes is written past the caches: it would not stay in them.
inline bool should_stream(int64_t bytes) { return bytes >= int64_t{12} << 20; }

struct Kernels {
  const char* instruction_set;
  // x_t = a x0 + s eps
  void (*q_sample)(const NoisingRow& row);
  // Sum over the row of norm(target - prediction).
  double (*loss)(const LossRow& row);
  // gradient[i] = scale * norm'(target[i] - prediction[i]), in the prediction's dtype.
  void (*loss_gradient)(const LossRow& row, double scale, void* gradient);
  // map[p] = scale * sum over C of norm(target - prediction); fp64 for fp64, else fp32.
  void (*error_map)(const LossRow& row, double scale, void* map);
};

// Codes as in dive_fast/ops/_nearest_row.py (METRICS).
enum class Metric : int { l2, cosine };

// A tile of pairs, some queries against some rows. Its size depends on the registers of a set.
struct SearchKernels {
  int64_t tile_queries, tile_rows;
  // scores[i * tile_rows + j] += sum of (q_i[k] - r_j[k])^2 or q_i[k] r_j[k], k in [begin, end).
  // The order of the sum is the same for every pair, so equal rows have equal scores.
  void (*add_scores)(const void* const* queries, const void* const* rows, int64_t begin,
                     int64_t end, Dtype dtype, Metric metric, double* scores);
  // Sum over k of (q[k] - r[k])^2 or q[k] r[k], in fp64.
  double (*exact_score)(const void* query, const void* row, int64_t n, Dtype dtype, Metric metric);
};

// The best set that this processor has; DIVE_FAST_CPU=plain|avx2|avx512 caps it.
const Kernels& kernels();
const SearchKernels& search_kernels();

}  // namespace dive_fast::cpu
