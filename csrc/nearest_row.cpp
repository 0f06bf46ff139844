// nearest_row on the CPU: a blocked search in which the argmin is folded in.
//
// Queries (in blocks that stay in the second-level cache) meet panels of a few rows (in the first),
// and each panel's scores are compared at once and forgotten: the extra memory is one number per
// query and chunk of rows, never N x V.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

namespace dive_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kQueryBlock = 128;
constexpr int64_t kDepthBlock = 1024;  // elements of D at a time
constexpr double kMultiplicationsPerTask = 1 << 18;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The best row so far. Lower keys win, and among equal keys lower rows. Only finite keys are
// offered: NaN is no distance, and what is too large for a sum is infinitely far.
struct Best {
  double key = kInfinity;
  int64_t row = -1;

  void offer(double other_key, int64_t other_row) {
    if (other_key < key || (other_key == key && other_row < row)) {
      key = other_key;
      row = other_row;
    }
  }
};

// The rows that each query may take: [start, stop), and the extra ones, which all may take.
class Allowed {
 public:
  Allowed(const std::optional<Tensor>& ranges, const std::optional<Tensor>& extra, int64_t queries,
          int64_t rows)
      : rows_(rows) {
    if (ranges) {
      check_on_cpu(op, "allowed", *ranges);
      check(ranges->dim() == 2 && ranges->size(0) == queries && ranges->size(1) == 2 &&
                ranges->scalar_type() == ScalarType::Long,
            op, ": allowed must be int64 of shape [", queries, ", 2]");
      ranges_ = torch::stable::contiguous(*ranges);
      bounds_ = static_cast<const int64_t*>(ranges_->const_data_ptr());
    }
    if (extra) {
      const Index ids(op, "extra", *extra, extra->numel(), rows);
      for (int64_t i = 0; i < extra->numel(); ++i) extra_.push_back(ids[i]);
    }
    for (int64_t n = 0; n < queries; ++n) {
      if (start(n) < 0 || start(n) > stop(n) || stop(n) > rows) {
        std::ostringstream message;
        message << op << ": allowed must be ranges within [0, " << rows << "], but got ["
                << start(n) << ", " << stop(n) << ") at position " << n;
        throw std::out_of_range(message.str());  // IndexError in Python
      }
      check(start(n) < stop(n) || !extra_.empty(), op,
            ": allowed must leave every query a row, but got [", start(n), ", ", stop(n),
            ") at position ", n, " and no extra rows");
    }
  }

  int64_t start(int64_t n) const { return bounds_ ? bounds_[2 * n] : 0; }
  int64_t stop(int64_t n) const { return bounds_ ? bounds_[2 * n + 1] : rows_; }
  const std::vector<int64_t>& extra() const { return extra_; }

  int64_t lowest(int64_t n) const {
    int64_t row = start(n) < stop(n) ? start(n) : rows_;
    for (const int64_t id : extra_) row = std::min(row, id);
    return row;
  }

 private:
  static constexpr const char* op = "nearest_row";
  int64_t rows_;
  std::optional<Tensor> ranges_;
  const int64_t* bounds_ = nullptr;
  std::vector<int64_t> extra_;
};

class Search {
 public:
  Search(const Tensor& v, const Tensor& table, const Allowed& allowed, int64_t metric)
      : queries_(v.size(0)),
        rows_(table.size(0)),
        dim_(v.size(1)),
        dtype_(dtype_of("nearest_row", "v", v)),
        metric_(static_cast<cpu::Metric>(metric)),
        v_(v),
        table_(table),
        allowed_(allowed),
        order_(static_cast<size_t>(queries_)) {
    std::iota(order_.begin(), order_.end(), 0);
    // Queries with like ranges side by side, so that whole tiles can skip a panel.
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t i, int64_t j) {
      return std::pair(allowed.start(i), allowed.stop(i)) <
             std::pair(allowed.start(j), allowed.stop(j));
    });
  }

  // The best row of every query, in the order of the queries.
  std::vector<Best> run() const {
    const int64_t blocks = (queries_ + kQueryBlock - 1) / kQueryBlock;
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t per_thread =
        threads > 1 ? std::max<int64_t>(1, 4 / std::max<int64_t>(1, blocks)) : 1;
    const int64_t chunks =
        std::max<int64_t>(1, std::min(threads * per_thread, rows_ / (8 * kernels_.tile_rows)));
    const int64_t tasks = blocks * chunks;
    const double work = static_cast<double>(queries_) * static_cast<double>(rows_) *
                        static_cast<double>(dim_) /
                        static_cast<double>(std::max<int64_t>(tasks, 1));
    const int64_t grain = static_cast<int64_t>(std::max(1.0, kMultiplicationsPerTask / (work + 1)));
    std::vector<Best> found(static_cast<size_t>(chunks * queries_));
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        // Consecutive tasks go to one thread: spread the chunks, for ranges leave some empty.
        const int64_t chunk = task % chunks, block = task / chunks;
        const int64_t spread = chunks % threads == 0 ? chunk / (chunks / threads) +
                                                           chunk % (chunks / threads) * threads
                                                     : chunk;
        search_range(block * kQueryBlock, std::min(queries_, (block + 1) * kQueryBlock),
                     rows_ * spread / chunks, rows_ * (spread + 1) / chunks,
                     found.data() + spread * queries_);
      }
    });
    std::vector<Best> best(found.begin(), found.begin() + queries_);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      for (int64_t n = 0; n < queries_; ++n) {
        const Best& other = found[static_cast<size_t>(chunk * queries_ + n)];
        if (other.row >= 0) best[static_cast<size_t>(n)].offer(other.key, other.row);
      }
    }
    search_extra(best.data());
    for (int64_t n = 0; n < queries_; ++n) {
      Best& b = best[static_cast<size_t>(n)];
      if (b.row < 0) b.row = allowed_.lowest(n);
    }
    return best;
  }

  // The Euclidean distance, or 1 - cosine similarity, of a query and a row.
  double distance(int64_t n, int64_t row) const {
    const double score = kernels_.exact_score(v_[n], table_[row], dim_, dtype_, metric_);
    if (metric_ == cpu::Metric::l2) return std::sqrt(score);
    const double product = std::sqrt(square(v_[n])) * std::sqrt(square(table_[row]));
    return product == 0 ? 1.0 : 1.0 - score / product;
  }

 private:
  void search_range(int64_t begin, int64_t end, int64_t first_row, int64_t stop_row,
                    Best* best) const {
    std::vector<int64_t> active;
    for (int64_t panel = first_row; panel < stop_row; panel += kernels_.tile_rows) {
      const int64_t panel_stop = std::min(panel + kernels_.tile_rows, stop_row);
      active.clear();
      for (int64_t tile = begin; tile < end; tile += kernels_.tile_queries) {
        for (int64_t i = tile; i < std::min(tile + kernels_.tile_queries, end); ++i) {
          const int64_t n = order_[static_cast<size_t>(i)];
          if (allowed_.start(n) < panel_stop && allowed_.stop(n) > panel) {
            active.push_back(tile);
            break;
          }
        }
      }
      if (active.empty()) continue;
      search_panel(
          active, end, panel_stop - panel, [panel](int64_t j) { return panel + j; },
          [&](int64_t n, int64_t row, double key) {
            if (row >= allowed_.start(n) && row < allowed_.stop(n)) best[n].offer(key, row);
          });
    }
  }

  void search_extra(Best* best) const {
    const std::vector<int64_t>& extra = allowed_.extra();
    const int64_t count = static_cast<int64_t>(extra.size());
    if (count == 0) return;
    torch::stable::parallel_for(0, queries_, kQueryBlock, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> active;
      for (int64_t block = begin; block < end; block += kQueryBlock) {
        const int64_t block_end = std::min(block + kQueryBlock, end);
        active.clear();
        for (int64_t tile = block; tile < block_end; tile += kernels_.tile_queries) {
          active.push_back(tile);
        }
        for (int64_t panel = 0; panel < count; panel += kernels_.tile_rows) {
          search_panel(
              active, block_end, std::min(kernels_.tile_rows, count - panel),
              [&](int64_t j) { return extra[static_cast<size_t>(panel + j)]; },
              [&](int64_t n, int64_t row, double key) { best[n].offer(key, row); });
        }
      }
    });
  }

  // Offers (query, row, key) for the queries of the active tiles and the `count` rows of a panel.
  template <typename RowOf, typename Offer>
  void search_panel(const std::vector<int64_t>& active, int64_t queries_end, int64_t count,
                    const RowOf& row_of, const Offer& offer) const {
    constexpr int64_t kMostQueries = 8, kMostRows = 8;  // of any instruction set's tile
    const int64_t tile_queries = kernels_.tile_queries, tile_rows = kernels_.tile_rows;
    const void* rows[kMostRows];
    double row_scale[kMostRows];
    for (int64_t j = 0; j < tile_rows; ++j) rows[j] = table_[row_of(std::min(j, count - 1))];
    for (int64_t j = 0; j < count; ++j) row_scale[j] = key_scale(rows[j]);

    double scores[(kQueryBlock + kMostQueries) * kMostRows];
    std::fill_n(scores, static_cast<int64_t>(active.size()) * tile_queries * tile_rows, 0.0);
    const int64_t steps = (dim_ + kDepthBlock - 1) / kDepthBlock;
    for (int64_t step = 0; step < steps; ++step) {
      double* tile_scores = scores;
      for (const int64_t tile : active) {
        const void* queries[kMostQueries];
        for (int64_t i = 0; i < tile_queries; ++i) {
          queries[i] = v_[order_[static_cast<size_t>(std::min(tile + i, queries_end - 1))]];
        }
        kernels_.add_scores(queries, rows, step * kDepthBlock,
                            std::min((step + 1) * kDepthBlock, dim_), dtype_, metric_, tile_scores);
        tile_scores += tile_queries * tile_rows;
      }
    }
    const double* score = scores;
    for (const int64_t tile : active) {
      for (int64_t i = 0; i < tile_queries; ++i, score += tile_rows) {
        if (tile + i >= queries_end) continue;
        const int64_t n = order_[static_cast<size_t>(tile + i)];
        for (int64_t j = 0; j < count; ++j) {
          const double key = score[j] * row_scale[j];
          if (std::isfinite(key)) offer(n, row_of(j), key);
        }
      }
    }
  }

  // What turns a score into a key, lower for nearer: |q| is common to all rows and left out.
  double key_scale(const void* row) const {
    if (metric_ == cpu::Metric::l2) return 1.0;
    const double norm = std::sqrt(square(row));
    if (!std::isfinite(norm)) return std::numeric_limits<double>::quiet_NaN();
    return norm == 0 ? 0.0 : -1.0 / norm;
  }

  double square(const void* row) const {
    return kernels_.exact_score(row, row, dim_, dtype_, cpu::Metric::cosine);
  }

  const int64_t queries_, rows_, dim_;  // N, V, D
  const cpu::Dtype dtype_;
  const cpu::Metric metric_;
  const Rows v_, table_;
  const Allowed& allowed_;
  const cpu::SearchKernels& kernels_ = cpu::search_kernels();
  std::vector<int64_t> order_;
};

// index[n] = argmin over allowed r of distance(v[n], table[r])
std::tuple<Tensor, Tensor> nearest_row(const Tensor& v,                       // [N, D]
                                       const Tensor& table,                   // [V, D]
                                       const std::optional<Tensor>& allowed,  // [N, 2]
                                       const std::optional<Tensor>& extra,    // [E]
                                       int64_t metric) {
  constexpr const char* op = "nearest_row";
  check_on_cpu(op, "v", v);
  check_on_cpu(op, "table", table);
  check(v.dim() == 2, op, ": v must have shape [N, D], but got ", v.dim(), " dimensions");
  check(table.dim() == 2 && table.size(1) == v.size(1), op, ": table must have shape [V, ",
        v.size(1), "], but got ", table.dim(), " dimensions");
  check(dtype_of(op, "table", table) == dtype_of(op, "v", v), op,
        ": table must have the dtype of v, but got ",
        torch::headeronly::toString(table.scalar_type()));
  check(metric == 0 || metric == 1, op, ": metric must be in [0, 2), but got ", metric);
  const int64_t n = v.size(0);
  const Allowed rows(allowed, extra, n, table.size(0));

  const bool is_double = v.scalar_type() == ScalarType::Double;
  Tensor index = torch::stable::new_empty(v, {n}, ScalarType::Long);
  Tensor distance =
      torch::stable::new_empty(v, {n}, is_double ? ScalarType::Double : ScalarType::Float);
  const Search search(v, table, rows, metric);
  const std::vector<Best> best = search.run();
  int64_t* index_out = static_cast<int64_t*>(index.mutable_data_ptr());
  void* distance_out = distance.mutable_data_ptr();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = best[static_cast<size_t>(i)].row;
    const double value = search.distance(i, row);
    index_out[i] = row;
    if (is_double) {
      static_cast<double*>(distance_out)[i] = value;
    } else {
      static_cast<float*>(distance_out)[i] = static_cast<float>(value);
    }
  }
  return {index, distance};
}

}  // namespace
}  // namespace dive_fast

STABLE_TORCH_LIBRARY_IMPL(dive_fast, CPU, m) {
  m.impl("nearest_row", TORCH_BOX(&dive_fast::nearest_row));
}
