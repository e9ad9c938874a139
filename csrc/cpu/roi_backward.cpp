// RoI layers on the CPU, backward: the same weights, with reading and writing exchanged.
//
// Chapter 9. Several RoIs add to one cell, so threads must not share cells. Each thread therefore owns some channels of
// every cell and walks through all RoIs: no locks, no copies of the map, and the same sums in the same order for any
// number of threads, which makes the gradient reproducible to the bit.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "axis_taps.h"
#include "kernels.h"

namespace mrcnn_edu {

// cell[c] += weight * gradient[c] for each of the bin's cells.
template <typename A>
MRCNN_INLINE void add_to_rows_loop(
    A* const* row, const A* weight, int64_t rows, int64_t channels, const A* __restrict gradient) {
  for (int64_t k = 0; k < rows; ++k) {
    A* __restrict cell = row[k];
    const A w = weight[k];
    for (int64_t c = 0; c < channels; ++c) cell[c] += w * gradient[c];
  }
}
MRCNN_EVERY_CPU void add_to_rows(float* const* row, const float* weight, int64_t rows, int64_t channels, const float* g) {
  add_to_rows_loop(row, weight, rows, channels, g);
}
MRCNN_EVERY_CPU void add_to_rows(double* const* row, const double* weight, int64_t rows, int64_t channels, const double* g) {
  add_to_rows_loop(row, weight, rows, channels, g);
}

// Calls work(first, last) for ranges of channels, one per thread, each at least a cache line wide.
template <typename Work>
void for_channels(int64_t channels, const Work& work) {
  constexpr int64_t kLine = 16;
  const int64_t lines = (channels + kLine - 1) / kLine;
  at::parallel_for(0, lines, 1, [&](int64_t begin, int64_t end) {
    work(begin * kLine, std::min(end * kLine, channels));
  });
}

template <typename T, typename A>
void roi_mean_backward(const RoiProblem& problem, const T* gradient) {
  const std::vector<int64_t> order = order_of_visit(problem);
  const int64_t channels = problem.channels;
  for_channels(channels, [&](int64_t first, int64_t last) {
    MeanTaps<A> ys, xs;
    BinRows<A, A> bin_rows;
    std::vector<A> part(last - first);
    for (const int64_t r : order) {
      const int64_t width = problem.maps[problem.level[r]].width;
      A* cells = problem.image_cells<A>(r) + first;
      ys.build(problem.axis_y<A>(r));
      xs.build(problem.axis_x<A>(r));
      bin_rows.reserve(ys, xs);
      const T* bin = gradient + r * problem.bins_y * problem.bins_x * channels;
      for (int by = 0; by < problem.bins_y; ++by) {
        for (int bx = 0; bx < problem.bins_x; ++bx, bin += channels) {
          const int64_t rows = bin_rows.fill(ys, xs, by, bx, cells, width, channels);
          std::copy(bin + first, bin + last, part.begin());
          add_to_rows(bin_rows.row.data(), bin_rows.weight.data(), rows, last - first, part.data());
        }
      }
    }
  });
}

template <typename T, typename A>
void roi_max_backward(const RoiProblem& problem, const T* gradient, const int32_t* winners) {
  const std::vector<int64_t> order = order_of_visit(problem);
  const int64_t channels = problem.channels;
  for_channels(channels, [&](int64_t first, int64_t last) {
    SampleTaps<A> ys, xs;
    for (const int64_t r : order) {
      const int64_t width = problem.maps[problem.level[r]].width;
      A* cells = problem.image_cells<A>(r);
      ys.build(problem.axis_y<A>(r));
      xs.build(problem.axis_x<A>(r));
      int64_t bin = r * problem.bins_y * problem.bins_x * channels;
      for (int by = 0; by < problem.bins_y; ++by) {
        for (int bx = 0; bx < problem.bins_x; ++bx, bin += channels) {
          const int64_t samples = int64_t(ys.count(by)) * xs.count(bx);
          for (int64_t c = first; c < last; ++c) {
            const int32_t winner = winners[bin + c];
            if (winner < 0 || winner >= samples) continue;  // none, or not a winner of this problem
            const A g = static_cast<A>(gradient[bin + c]);
            const Taps<A>& y = ys.at(by, winner / xs.count(bx));
            const Taps<A>& x = xs.at(bx, winner % xs.count(bx));
            cells[(y.low * width + x.low) * channels + c] += y.low_weight * x.low_weight * g;
            cells[(y.low * width + x.high) * channels + c] += y.low_weight * x.high_weight * g;
            cells[(y.high * width + x.low) * channels + c] += y.high_weight * x.low_weight * g;
            cells[(y.high * width + x.high) * channels + c] += y.high_weight * x.high_weight * g;
          }
        }
      }
    }
  });
}

#define MRCNN_INSTANTIATE(T, A)                                        \
  template void roi_mean_backward<T, A>(const RoiProblem&, const T*); \
  template void roi_max_backward<T, A>(const RoiProblem&, const T*, const int32_t*);
MRCNN_INSTANTIATE(float, float)
MRCNN_INSTANTIATE(double, double)
MRCNN_INSTANTIATE(c10::BFloat16, float)
MRCNN_INSTANTIATE(c10::Half, float)

}  // namespace mrcnn_edu
