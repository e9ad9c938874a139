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
#include "inner_loops.h"
#include "kernels.h"

namespace mrcnn_edu {

// Calls work(first, last) for ranges of channels, one per thread, each at least a cache line wide.
template <typename Work>
void for_channels(int64_t channels, const Work& work) {
  constexpr int64_t kLine = 16;
  const int64_t lines = (channels + kLine - 1) / kLine;
  at::parallel_for(0, lines, 1, [&](int64_t begin, int64_t end) {
    work(begin * kLine, std::min(end * kLine, channels));
  });
}

// Every cell that a RoI reads asks which bins read it. The axes take turns: a line of cells first sums what it gets from
// the bins above each other, then its cells from those side by side; so each cell of the map is touched once per RoI.
template <typename T, typename A>
void roi_mean_backward(const RoiProblem& problem, const T* gradient) {
  const std::vector<int64_t> order = order_of_visit(problem);
  const int64_t channels = problem.channels, bins_x = problem.bins_x;
  for_channels(channels, [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    MeanTaps<A> taps;
    CellTaps<A> ys, xs;
    std::vector<const T*> above;
    std::vector<const A*> beside;
    std::vector<A> line(bins_x * count);  // [bins_x, count]
    for (const int64_t r : order) {
      taps.build(problem.axis_y<A>(r));
      ys.build(taps);
      taps.build(problem.axis_x<A>(r));
      xs.build(taps);
      above.resize(std::max(above.size(), largest_part(ys.begin)));
      beside.resize(std::max(beside.size(), largest_part(xs.begin)));
      const int64_t width = problem.maps[problem.level[r]].width;
      const T* bins = gradient + r * problem.bins_y * bins_x * channels + first;
      for (size_t y = 0; y < ys.cell.size(); ++y) {
        const int64_t rows = ys.begin[y + 1] - ys.begin[y];
        for (int64_t bx = 0; bx < bins_x; ++bx) {
          for (int64_t k = 0; k < rows; ++k) above[k] = bins + (ys.bin[ys.begin[y] + k] * bins_x + bx) * channels;
          sum_rows(above.data(), ys.weight.data() + ys.begin[y], rows, count, line.data() + bx * count);
        }
        A* cells = problem.image_cells<A>(r) + ys.cell[y] * width * channels + first;
        for (size_t x = 0; x < xs.cell.size(); ++x) {
          const int64_t columns = xs.begin[x + 1] - xs.begin[x];
          for (int64_t k = 0; k < columns; ++k) beside[k] = line.data() + xs.bin[xs.begin[x] + k] * count;
          add_rows(beside.data(), xs.weight.data() + xs.begin[x], columns, count, cells + xs.cell[x] * channels);
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
