// RoI layers on the CPU, forward.
//
// Chapter 9. Maps are channels last, so that a cell is one contiguous row of numbers and a bin a weighted sum of such
// rows: the inner loops run over channels, and the compiler turns them into vector instructions. No sum is ever
// reordered or fused (-ffp-contract=off), so every processor gives the same bits.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <type_traits>

#include "axis_taps.h"
#include "kernels.h"

namespace mrcnn_edu {

std::vector<int64_t> order_of_visit(const RoiProblem& problem) {
  constexpr int kBand = 16;  // rows of cells
  std::vector<std::tuple<int64_t, float, int64_t, float>> place(problem.rois);
  for (int64_t r = 0; r < problem.rois; ++r) {
    const float* roi = problem.roi + 5 * r;
    const double scale = problem.maps[problem.level[r]].scale;
    place[r] = {problem.level[r], roi[0], round_to_cell(roi[2] * scale) / kBand, roi[1]};
  }
  std::vector<int64_t> order(problem.rois);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return place[a] < place[b]; });
  return order;
}

// ---------------------------------------------------------------------------------------------------------------------
// Inner loops
// ---------------------------------------------------------------------------------------------------------------------

// sum[c] = weight[0] * row[0][c] + weight[1] * row[1][c] + ..., four rows per pass over the channels.
template <typename T, typename A>
MRCNN_INLINE void sum_rows_loop(const T* const* row, const A* weight, int64_t rows, int64_t channels, A* __restrict sum) {
  int64_t k = 0;
  if (rows >= 4) {
    const T *r0 = row[0], *r1 = row[1], *r2 = row[2], *r3 = row[3];
    const A w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] = (w0 * A(r0[c]) + w1 * A(r1[c])) + (w2 * A(r2[c]) + w3 * A(r3[c]));
    }
    k = 4;
  } else {
    for (int64_t c = 0; c < channels; ++c) sum[c] = A(0);
  }
  for (; k + 4 <= rows; k += 4) {
    const T *r0 = row[k], *r1 = row[k + 1], *r2 = row[k + 2], *r3 = row[k + 3];
    const A w0 = weight[k], w1 = weight[k + 1], w2 = weight[k + 2], w3 = weight[k + 3];
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += (w0 * A(r0[c]) + w1 * A(r1[c])) + (w2 * A(r2[c]) + w3 * A(r3[c]));
    }
  }
  for (; k < rows; ++k) {
    const T* r0 = row[k];
    const A w0 = weight[k];
    for (int64_t c = 0; c < channels; ++c) sum[c] += w0 * A(r0[c]);
  }
}

// best[c] = max(best[c], the sample), and which sample it was. The first of equal ones stays; NaN beats every number.
// A whole cell is row[0] as it is: a neighbour with weight 0 must not spoil it by 0 * inf.
template <typename T, typename A>
MRCNN_INLINE void max_sample_loop(
    const T* const* row, const A* weight, bool whole_cell, int32_t sample, int64_t channels, A* best, int32_t* winner) {
  const T *r0 = row[0], *r1 = row[1], *r2 = row[2], *r3 = row[3];
  const A w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
  for (int64_t c = 0; c < channels; ++c) {
    const A value =
        whole_cell ? A(r0[c]) : (w0 * A(r0[c]) + w1 * A(r1[c])) + (w2 * A(r2[c]) + w3 * A(r3[c]));
    const bool better = sample == 0 || value > best[c] || (value != value && best[c] == best[c]);
    best[c] = better ? value : best[c];
    winner[c] = better ? sample : winner[c];
  }
}

// One function per type of map, each compiled for several processors.
#define MRCNN_INNER_LOOPS(T, A)                                                                                 \
  MRCNN_EVERY_CPU void sum_rows(const T* const* row, const A* weight, int64_t rows, int64_t channels, A* sum) { \
    sum_rows_loop(row, weight, rows, channels, sum);                                                            \
  }                                                                                                             \
  MRCNN_EVERY_CPU void max_sample(                                                                              \
      const T* const* row, const A* weight, bool whole_cell, int32_t sample, int64_t channels, A* best,         \
      int32_t* winner) {                                                                                        \
    max_sample_loop(row, weight, whole_cell, sample, channels, best, winner);                                   \
  }
MRCNN_INNER_LOOPS(float, float)
MRCNN_INNER_LOOPS(double, double)
MRCNN_INNER_LOOPS(c10::BFloat16, float)
MRCNN_INNER_LOOPS(c10::Half, float)
#undef MRCNN_INNER_LOOPS

// ---------------------------------------------------------------------------------------------------------------------
// Mean
// ---------------------------------------------------------------------------------------------------------------------

template <typename T, typename A>
void roi_mean_forward(const RoiProblem& problem, T* out) {
  const std::vector<int64_t> order = order_of_visit(problem);
  const int64_t channels = problem.channels;
  at::parallel_for(0, problem.rois, 1, [&](int64_t begin, int64_t end) {
    MeanTaps<A> ys, xs;
    BinRows<const T, A> bin_rows;
    std::vector<A> sum(channels);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t r = order[n];
      const int64_t width = problem.maps[problem.level[r]].width;
      const T* cells = problem.image_cells<const T>(r);
      ys.build(problem.axis_y<A>(r));
      xs.build(problem.axis_x<A>(r));
      bin_rows.reserve(ys, xs);
      T* bin = out + r * problem.bins_y * problem.bins_x * channels;
      for (int by = 0; by < problem.bins_y; ++by) {
        for (int bx = 0; bx < problem.bins_x; ++bx, bin += channels) {
          const int64_t rows = bin_rows.fill(ys, xs, by, bx, cells, width, channels);
          if constexpr (std::is_same_v<T, A>) {
            sum_rows(bin_rows.row.data(), bin_rows.weight.data(), rows, channels, bin);
          } else {
            sum_rows(bin_rows.row.data(), bin_rows.weight.data(), rows, channels, sum.data());
            std::copy(sum.begin(), sum.end(), bin);
          }
        }
      }
    }
  });
}

// One plane at a time: first the rows of a bin are summed, then its columns. For maps with few channels, and for maps
// that are channels first when there are too few RoIs to make turning the map round worth while.
template <typename T, typename A>
void roi_mean_forward_planes(const RoiProblem& problem, T* out) {
  const std::vector<int64_t> order = order_of_visit(problem);
  const int64_t bins = int64_t(problem.bins_y) * problem.bins_x;
  at::parallel_for(0, problem.rois, 1, [&](int64_t begin, int64_t end) {
    MeanTaps<A> ys, xs;
    std::vector<const T*> row;
    std::vector<A> line;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t r = order[n];
      const Map& map = problem.maps[problem.level[r]];
      ys.build(problem.axis_y<A>(r));
      xs.build(problem.axis_x<A>(r));
      T* bin = out + r * problem.channels * bins;
      if (xs.cell.empty()) {
        std::fill(bin, bin + problem.channels * bins, T(0));
        continue;
      }
      const auto [left, right] = std::minmax_element(xs.cell.begin(), xs.cell.end());
      const int64_t columns = *right - *left + 1;
      line.resize(columns);
      for (int64_t c = 0; c < problem.channels; ++c) {
        const T* plane = problem.image_cells<const T>(r) + c * map.height * map.width + *left;
        for (int by = 0; by < problem.bins_y; ++by) {
          row.clear();
          for (size_t y = ys.begin[by]; y < ys.begin[by + 1]; ++y) row.push_back(plane + int64_t(ys.cell[y]) * map.width);
          sum_rows(row.data(), ys.weight.data() + ys.begin[by], ys.count(by), columns, line.data());
          for (int bx = 0; bx < problem.bins_x; ++bx, ++bin) {
            A sum = 0;
            for (size_t x = xs.begin[bx]; x < xs.begin[bx + 1]; ++x) sum += xs.weight[x] * line[xs.cell[x] - *left];
            *bin = static_cast<T>(sum);
          }
        }
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Maximum
// ---------------------------------------------------------------------------------------------------------------------

template <typename T, typename A>
void roi_max_forward(const RoiProblem& problem, T* out, int32_t* winners) {
  const std::vector<int64_t> order = order_of_visit(problem);
  const bool whole_cells = problem.layer == Layer::roi_pool;
  const int64_t channels = problem.channels;
  at::parallel_for(0, problem.rois, 1, [&](int64_t begin, int64_t end) {
    SampleTaps<A> ys, xs;
    std::vector<A> best(channels);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t r = order[n];
      const int64_t width = problem.maps[problem.level[r]].width;
      const T* cells = problem.image_cells<const T>(r);
      ys.build(problem.axis_y<A>(r));
      xs.build(problem.axis_x<A>(r));
      int64_t bin = r * problem.bins_y * problem.bins_x * channels;
      for (int by = 0; by < problem.bins_y; ++by) {
        for (int bx = 0; bx < problem.bins_x; ++bx, bin += channels) {
          std::fill(best.begin(), best.end(), A(0));
          std::fill(winners + bin, winners + bin + channels, -1);
          int32_t sample = 0;
          for (int i = 0; i < ys.count(by); ++i) {
            const Taps<A>& y = ys.at(by, i);
            for (int j = 0; j < xs.count(bx); ++j, ++sample) {
              const Taps<A>& x = xs.at(bx, j);
              const T* row[4] = {
                  cells + (y.low * width + x.low) * channels, cells + (y.low * width + x.high) * channels,
                  cells + (y.high * width + x.low) * channels, cells + (y.high * width + x.high) * channels};
              const A weight[4] = {y.low_weight * x.low_weight, y.low_weight * x.high_weight,
                                   y.high_weight * x.low_weight, y.high_weight * x.high_weight};
              max_sample(row, weight, whole_cells, sample, channels, best.data(), winners + bin);
            }
          }
          std::copy(best.begin(), best.end(), out + bin);
        }
      }
    }
  });
}

#define MRCNN_INSTANTIATE(T, A)                                          \
  template void roi_mean_forward<T, A>(const RoiProblem&, T*);           \
  template void roi_mean_forward_planes<T, A>(const RoiProblem&, T*);    \
  template void roi_max_forward<T, A>(const RoiProblem&, T*, int32_t*);
MRCNN_INSTANTIATE(float, float)
MRCNN_INSTANTIATE(double, double)
MRCNN_INSTANTIATE(c10::BFloat16, float)
MRCNN_INSTANTIATE(c10::Half, float)

}  // namespace mrcnn_edu
