// RoI layers on the CPU, forward.
//
// Chapter 9. With channels last, a cell is one contiguous row of numbers and a bin a weighted sum of such rows. RoIs are
// shared out among the threads.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <type_traits>

#include "axis_taps.h"
#include "inner_loops.h"
#include "kernels.h"
#include "transpose.h"

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
// Mean
// ---------------------------------------------------------------------------------------------------------------------

template <typename T, typename A>
void store(const A* sum, int64_t count, T* rounded, T* target, bool past_caches) {
  if constexpr (std::is_same_v<T, A>) {
    if (past_caches) store_past_caches(target, sum, count * sizeof(T));
    else std::copy(sum, sum + count, target);
  } else {
    std::copy(sum, sum + count, past_caches ? rounded : target);
    if (past_caches) store_past_caches(target, rounded, count * sizeof(T));
  }
}

// The cells on some lines and columns of a map [channels, height, width], as rows of numbers.
template <typename T>
void turn_window(
    const T* planes, const Map& map, const std::vector<int>& lines, const std::vector<int>& columns, int64_t channels,
    T* window) {
  for (int64_t c = 0; c < channels; ++c) {
    T* cell = window + c;
    for (const int y : lines) {
      const T* line = planes + (c * map.height + y) * map.width;
      for (const int x : columns) *cell = line[x], cell += channels;
    }
  }
}

template <typename T, typename A>
void roi_mean_forward(const RoiProblem& problem, bool planes, bool planes_out, T* out) {
  constexpr int64_t kLarge = 1 << 24;  // bytes
  const std::vector<int64_t> order = order_of_visit(problem);
  const int64_t channels = problem.channels, bins = int64_t(problem.bins_y) * problem.bins_x;
  const int64_t strip = planes ? std::min(kStrip, channels) : channels;  // channels at a time, to stay in the cache
  const bool large = !planes_out && problem.rois * bins * channels * int64_t(sizeof(T)) > kLarge;
  at::parallel_for(0, problem.rois, 1, [&](int64_t begin, int64_t end) {
    MeanTaps<A> ys, xs;
    BinRows<const T, A> bin_rows;
    std::vector<T> window, rounded(strip), turned(planes_out ? bins * strip : 0);
    std::vector<A> sum(strip);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t r = order[n];
      const Map& map = problem.maps[problem.level[r]];
      ys.build(problem.axis_y<A>(r));
      xs.build(problem.axis_x<A>(r));
      bin_rows.reserve(ys, xs);
      const T* cells = problem.image_cells<const T>(r);
      std::vector<int> lines, columns;
      if (planes) {
        lines = ys.renumber(), columns = xs.renumber();
        window.resize(std::max<size_t>(window.size(), lines.size() * columns.size() * strip));
      }
      for (int64_t first = 0; first < channels; first += strip) {
        const int64_t count = std::min(strip, channels - first);
        if (planes) turn_window(cells + first * map.height * map.width, map, lines, columns, count, window.data());
        T* bin = planes_out ? turned.data() : out + r * bins * channels;
        for (int by = 0; by < problem.bins_y; ++by) {
          for (int bx = 0; bx < problem.bins_x; ++bx, bin += count) {
            const int64_t rows = planes ? bin_rows.fill(ys, xs, by, bx, window.data(), columns.size(), count)
                                        : bin_rows.fill(ys, xs, by, bx, cells, map.width, channels);
            sum_rows(bin_rows.row.data(), bin_rows.weight.data(), rows, count, sum.data());
            store(sum.data(), count, rounded.data(), bin, large);
          }
        }
        if (planes_out) transpose(turned.data(), bins, count, 0, count, out + (r * channels + first) * bins);
      }
    }
    finish_stores();
  });
}

// One plane at a time: first the rows of a bin are summed, then its columns.
template <typename T, typename A>
void roi_mean_forward_few_channels(const RoiProblem& problem, T* out) {
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
          for (size_t y = ys.begin[by]; y < ys.begin[by + 1]; ++y) {
            row.push_back(plane + int64_t(ys.cell[y]) * map.width);
          }
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

#define MRCNN_INSTANTIATE(T, A)                                              \
  template void roi_mean_forward<T, A>(const RoiProblem&, bool, bool, T*);   \
  template void roi_mean_forward_few_channels<T, A>(const RoiProblem&, T*);  \
  template void roi_max_forward<T, A>(const RoiProblem&, T*, int32_t*);
MRCNN_INSTANTIATE(float, float)
MRCNN_INSTANTIATE(double, double)
MRCNN_INSTANTIATE(c10::BFloat16, float)
MRCNN_INSTANTIATE(c10::Half, float)

}  // namespace mrcnn_edu
