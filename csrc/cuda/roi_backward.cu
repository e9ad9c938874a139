// RoI layers on CUDA, backward, in two ways.
//
// Chapter 9. From bins to cells: every bin adds to the cells it read, atomically. From cells to bins: every cell asks
// which bins read it and adds up in a fixed order, for torch.use_deterministic_algorithms(True).
#include "kernels.h"
#include "numbers.cuh"

namespace mrcnn_edu::cuda {
namespace {

template <typename T, typename A>
__global__ void bins_to_cells(RoiProblem problem, const T* gradient, const int32_t* winners, BadRow bad_row) {
  const int64_t items = problem.rois * problem.bins_y * problem.bins_x * problem.channels;
  for (int64_t item = first_item(); item < items; item += item_step()) {
    const Place place = locate(problem, item, problem.channels);
    if (!problem.is_valid(place.roi)) {
      if (place.channel == 0) *bad_row = static_cast<int>(place.roi) + 1;
      continue;
    }
    const Axis<A> y_axis = problem.axis_y<A>(place.roi), x_axis = problem.axis_x<A>(place.roi);
    const Samples<A> ys = samples_of_bin(y_axis, place.by), xs = samples_of_bin(x_axis, place.bx);
    A* cells = problem.image_cells<A>(place.roi) + place.channel;
    const int64_t column = problem.channels, row = x_axis.cells * column;
    const int64_t samples = int64_t(ys.count) * xs.count;
    if (samples == 0) continue;

    // For the mean all samples, for the maximum the winner alone.
    int64_t first = 0, last = samples;
    A share = to_sum<A>(gradient[item]);
    if (winners != nullptr) {
      first = winners[item];
      if (first < 0 || first >= samples) continue;
      last = first + 1;
    } else {
      share /= A(ys.count) * A(xs.count);
    }
    for (int64_t sample = first; sample < last; ++sample) {
      const Taps<A> y = taps_at(ys.position(static_cast<int>(sample / xs.count)), y_axis.cells);
      const Taps<A> x = taps_at(xs.position(static_cast<int>(sample % xs.count)), x_axis.cells);
      if (y.low_weight + y.high_weight == A(0) || x.low_weight + x.high_weight == A(0)) continue;  // off the map
      atomicAdd(cells + y.low * row + x.low * column, y.low_weight * x.low_weight * share);
      atomicAdd(cells + y.low * row + x.high * column, y.low_weight * x.high_weight * share);
      atomicAdd(cells + y.high * row + x.low * column, y.high_weight * x.low_weight * share);
      atomicAdd(cells + y.high * row + x.high * column, y.high_weight * x.high_weight * share);
    }
  }
}

template <typename A>
__device__ __forceinline__ A weight_of_cell(const Taps<A>& taps, int cell) {
  return (taps.low == cell ? taps.low_weight : A(0)) + (taps.high == cell ? taps.high_weight : A(0));
}

// The share that one cell has in a bin along one axis: the mean over the bin's samples.
template <typename A>
__device__ A mean_weight(const Samples<A>& samples, int cells, int cell) {
  A sum = A(0);
  for (int i = 0; i < samples.count; ++i) sum += weight_of_cell(taps_at(samples.position(i), cells), cell);
  return samples.count > 0 ? sum / A(samples.count) : A(0);
}

// Could any bin of this axis read the cell? Samples lie inside the RoI, and a sample reaches one cell to each side.
template <typename A>
__device__ __forceinline__ bool may_reach(const Axis<A>& axis, int cell) {
  const A one = axis.start, other = axis.start + axis.bin_size * A(axis.bins);
  return A(cell) >= std::fmin(one, other) - A(2) && A(cell) <= std::fmax(one, other) + A(2);
}

template <typename T, typename A>
__global__ void cells_to_bins(RoiProblem problem, int level, const T* gradient, const int32_t* winners, BadRow bad_row) {
  const Map& map = problem.maps[level];
  const int64_t items = problem.images * map.height * map.width * problem.channels;
  for (int64_t item = first_item(); item < items; item += item_step()) {
    const int64_t channel = item % problem.channels;
    int64_t cell = item / problem.channels;
    const int x = static_cast<int>(cell % map.width);
    cell /= map.width;
    const int y = static_cast<int>(cell % map.height);
    const int64_t image = cell / map.height;

    A sum = A(0);
    for (int64_t r = 0; r < problem.rois; ++r) {
      if (!problem.is_valid(r)) {
        if (item == 0) *bad_row = static_cast<int>(r) + 1;
        continue;
      }
      if (problem.level[r] != level || static_cast<int64_t>(problem.roi[5 * r]) != image) continue;
      const Axis<A> y_axis = problem.axis_y<A>(r), x_axis = problem.axis_x<A>(r);
      if (!may_reach(y_axis, y) || !may_reach(x_axis, x)) continue;
      int64_t bin = r * problem.bins_y * problem.bins_x;
      for (int by = 0; by < problem.bins_y; ++by) {
        const Samples<A> ys = samples_of_bin(y_axis, by);
        const A y_weight = mean_weight(ys, y_axis.cells, y);
        if (y_weight == A(0)) {
          bin += problem.bins_x;
          continue;
        }
        for (int bx = 0; bx < problem.bins_x; ++bx, ++bin) {
          const Samples<A> xs = samples_of_bin(x_axis, bx);
          A weight = y_weight * mean_weight(xs, x_axis.cells, x);
          if (weight == A(0)) continue;
          if (winners != nullptr) {
            const int32_t winner = winners[bin * problem.channels + channel];
            if (winner < 0 || winner >= int64_t(ys.count) * xs.count) continue;
            weight = weight_of_cell(taps_at(ys.position(winner / xs.count), y_axis.cells), y) *
                     weight_of_cell(taps_at(xs.position(winner % xs.count), x_axis.cells), x);
          }
          sum += weight * to_sum<A>(gradient[bin * problem.channels + channel]);
        }
      }
    }
    static_cast<A*>(map.cells)[item] = sum;
  }
}

}  // namespace

void roi_backward(
    const RoiProblem& problem, Number number, const void* gradient, const int32_t* winners, bool deterministic,
    BadRow bad_row, cudaStream_t stream) {
  for_number(number, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const T* g = static_cast<const T*>(gradient);
    if (!deterministic) {
      const Launch launch(problem.rois * problem.bins_y * problem.bins_x * problem.channels);
      bins_to_cells<T, A><<<launch.blocks, kThreads, 0, stream>>>(problem, g, winners, bad_row);
      return;
    }
    for (int level = 0; level < problem.levels; ++level) {
      const Map& map = problem.maps[level];
      const Launch launch(problem.images * map.height * map.width * problem.channels);
      cells_to_bins<T, A><<<launch.blocks, kThreads, 0, stream>>>(problem, level, g, winners, bad_row);
    }
  });
}

}  // namespace mrcnn_edu::cuda
