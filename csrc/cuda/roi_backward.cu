// RoI layers on CUDA, backward, in two ways.
//
// Chapter 9. From bins to cells: every bin adds to the cells it read, atomically. From cells to bins: every cell asks
// which bins read it and adds up in a fixed order, for torch.use_deterministic_algorithms(True).
#include <type_traits>

#include "kernels.h"
#include "numbers.cuh"

namespace mrcnn_edu::cuda {
namespace {

// cell[v] += weight * share[v], whatever other threads add meanwhile. Hopper and later add four floats at once.
template <typename A, int V>
__device__ __forceinline__ void add_atomically(A* cell, A weight, const A (&share)[V]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kAtOnce = std::is_same_v<A, float> && V == 4;
#else
  constexpr bool kAtOnce = false;
#endif
  if constexpr (kAtOnce) {
    atomicAdd(reinterpret_cast<float4*>(cell),
              make_float4(weight * share[0], weight * share[1], weight * share[2], weight * share[3]));
  } else {
    for (int v = 0; v < V; ++v) atomicAdd(cell + v, weight * share[v]);
  }
}

// The share of one sample, sent to the cells it lies between.
template <typename A, int V>
__device__ void add_sample(
    A* cells, const Samples<A>& ys, const Samples<A>& xs, int i, int j, const Axis<A>& y_axis, const Axis<A>& x_axis,
    int64_t row, int64_t column, const A (&share)[V]) {
  const Taps<A> y = taps_at(ys.position(i), y_axis.cells), x = taps_at(xs.position(j), x_axis.cells);
  if (y.low_weight + y.high_weight == A(0) || x.low_weight + x.high_weight == A(0)) return;  // off the map
  add_atomically(cells + y.low * row + x.low * column, y.low_weight * x.low_weight, share);
  add_atomically(cells + y.low * row + x.high * column, y.low_weight * x.high_weight, share);
  add_atomically(cells + y.high * row + x.low * column, y.high_weight * x.low_weight, share);
  add_atomically(cells + y.high * row + x.high * column, y.high_weight * x.high_weight, share);
}

// One thread takes one row of bins of one RoI for V neighbouring channels.
template <typename T, typename A, int V>
__global__ void mean_to_cells(RoiProblem problem, const T* gradient, BadRow bad_row) {
  const int64_t groups = problem.channels / V;
  const int64_t items = problem.rois * problem.bins_y * groups;
  for (int64_t item = first_item(); item < items; item += item_step()) {
    const Place place = locate(problem, item, groups);
    if (!problem.is_valid(place.roi)) {
      if (place.channel == 0) *bad_row = static_cast<int>(place.roi) + 1;
      continue;
    }
    const Axis<A> y_axis = problem.axis_y<A>(place.roi), x_axis = problem.axis_x<A>(place.roi);
    const Samples<A> ys = samples_of_bin(y_axis, place.by);
    A* cells = problem.image_cells<A>(place.roi) + place.channel * V;
    const int64_t column = problem.channels, row = x_axis.cells * column;
    const bool few = few_samples(y_axis, x_axis);
    const Reads<A> y(ys, few ? y_axis.cells : 0);
    const int64_t line = place.roi * problem.bins_y + place.by;
    const Pack<T, V>* own =
        reinterpret_cast<const Pack<T, V>*>(gradient) + line * problem.bins_x * groups + place.channel;
    for (int bx = 0; bx < problem.bins_x; ++bx) {
      const Samples<A> xs = samples_of_bin(x_axis, bx);
      if (ys.count == 0 || xs.count == 0) continue;
      const Pack<T, V> pack = own[bx * groups];
      A share[V];
      for (int v = 0; v < V; ++v) share[v] = to_sum<A>(pack.value[v]) / (A(ys.count) * A(xs.count));
      if (few) {
        const Reads<A> x(xs, x_axis.cells);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (y.weight[i] == A(0)) continue;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (x.weight[j] == A(0)) continue;
            add_atomically(cells + y.cell[i] * row + x.cell[j] * column, y.weight[i] * x.weight[j], share);
          }
        }
        continue;
      }
      for (int i = 0; i < ys.count; ++i) {
        for (int j = 0; j < xs.count; ++j) add_sample(cells, ys, xs, i, j, y_axis, x_axis, row, column, share);
      }
    }
  }
}

// The maximum's gradient goes to the winner alone.
template <typename T, typename A>
__global__ void winners_to_cells(RoiProblem problem, const T* gradient, const int32_t* winners, BadRow bad_row) {
  const int64_t items = problem.rois * problem.bins_y * problem.channels;
  for (int64_t item = first_item(); item < items; item += item_step()) {
    const Place place = locate(problem, item, problem.channels);
    if (!problem.is_valid(place.roi)) {
      if (place.channel == 0) *bad_row = static_cast<int>(place.roi) + 1;
      continue;
    }
    const Axis<A> y_axis = problem.axis_y<A>(place.roi), x_axis = problem.axis_x<A>(place.roi);
    const Samples<A> ys = samples_of_bin(y_axis, place.by);
    A* cells = problem.image_cells<A>(place.roi) + place.channel;
    const int64_t column = problem.channels, row = x_axis.cells * column;
    const int64_t line = place.roi * problem.bins_y + place.by;
    for (int bx = 0; bx < problem.bins_x; ++bx) {
      const Samples<A> xs = samples_of_bin(x_axis, bx);
      const int64_t bin = (line * problem.bins_x + bx) * problem.channels + place.channel;
      const int32_t winner = winners[bin];
      if (winner < 0 || winner >= int64_t(ys.count) * xs.count) continue;
      const A share[1] = {to_sum<A>(gradient[bin])};
      add_sample(cells, ys, xs, winner / xs.count, winner % xs.count, y_axis, x_axis, row, column, share);
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

struct Cell {
  int64_t image;
  int level, y, x;
};

// Asked of all RoIs at once, one by each thread of a block; so it also finds the bad rows.
template <typename A>
__device__ bool may_read(const RoiProblem& problem, int64_t roi, const Cell& cell, BadRow bad_row) {
  if (roi >= problem.rois) return false;
  if (!problem.is_valid(roi)) {
    *bad_row = static_cast<int>(roi) + 1;
    return false;
  }
  return problem.level[roi] == cell.level && static_cast<int64_t>(problem.roi[5 * roi]) == cell.image &&
         may_reach(problem.axis_y<A>(roi), cell.y) && may_reach(problem.axis_x<A>(roi), cell.x);
}

// What one channel of a cell gets from one RoI.
template <typename T, typename A>
__device__ A gradient_from(
    const RoiProblem& problem, int64_t roi, const Cell& cell, int64_t channel, const T* gradient,
    const int32_t* winners) {
  const Axis<A> y_axis = problem.axis_y<A>(roi), x_axis = problem.axis_x<A>(roi);
  A sum = A(0);
  for (int by = 0; by < problem.bins_y; ++by) {
    const Samples<A> ys = samples_of_bin(y_axis, by);
    const A y_weight = mean_weight(ys, y_axis.cells, cell.y);
    if (y_weight == A(0)) continue;
    for (int bx = 0; bx < problem.bins_x; ++bx) {
      const Samples<A> xs = samples_of_bin(x_axis, bx);
      A weight = y_weight * mean_weight(xs, x_axis.cells, cell.x);
      if (weight == A(0)) continue;
      const int64_t place = ((roi * problem.bins_y + by) * problem.bins_x + bx) * problem.channels + channel;
      if (winners != nullptr) {
        const int32_t winner = winners[place];
        if (winner < 0 || winner >= int64_t(ys.count) * xs.count) continue;
        weight = weight_of_cell(taps_at(ys.position(winner / xs.count), y_axis.cells), cell.y) *
                 weight_of_cell(taps_at(xs.position(winner % xs.count), x_axis.cells), cell.x);
      }
      sum += weight * to_sum<A>(gradient[place]);
    }
  }
  return sum;
}

// A block takes one cell after the other, and each of its threads one channel of them.
template <typename T, typename A>
__global__ void cells_to_bins(RoiProblem problem, int level, const T* gradient, const int32_t* winners, BadRow bad_row) {
  constexpr int kWarp = 32;
  __shared__ unsigned reading[kThreads / kWarp];  // a bit for each of the RoIs that are looked at together
  const Map& map = problem.maps[level];
  const int64_t channel = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  const int64_t cells = problem.images * map.height * map.width;
  for (int64_t place = blockIdx.x; place < cells; place += gridDim.x) {
    const int64_t line = place / map.width;
    const Cell cell{line / map.height, level, static_cast<int>(line % map.height), static_cast<int>(place % map.width)};
    A sum = A(0);
    for (int64_t first = 0; first < problem.rois; first += kThreads) {
      const unsigned answers = __ballot_sync(~0u, may_read<A>(problem, first + threadIdx.x, cell, bad_row));
      if (threadIdx.x % kWarp == 0) reading[threadIdx.x / kWarp] = answers;
      __syncthreads();
      for (int warp = 0; warp < kThreads / kWarp; ++warp) {
        for (unsigned rest = reading[warp]; rest != 0 && channel < problem.channels; rest &= rest - 1) {
          const int64_t roi = first + warp * kWarp + __ffs(static_cast<int>(rest)) - 1;
          sum += gradient_from<T, A>(problem, roi, cell, channel, gradient, winners);
        }
      }
      __syncthreads();  // before the bits are written again
    }
    if (channel < problem.channels) static_cast<A*>(map.cells)[place * problem.channels + channel] = sum;
  }
}

// Can four channels be read and written together? Of the gradient that takes `bytes`, of a map sixteen.
bool four_fit(const RoiProblem& problem, const void* gradient, size_t bytes) {
  bool fits = problem.channels % 4 == 0 && reinterpret_cast<uintptr_t>(gradient) % bytes == 0;
  for (int i = 0; i < problem.levels; ++i) fits &= reinterpret_cast<uintptr_t>(problem.maps[i].cells) % 16 == 0;
  return fits;
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
      const int64_t items = problem.rois * problem.bins_y * problem.channels;
      if (winners != nullptr) {
        winners_to_cells<T, A><<<Launch(items).blocks, kThreads, 0, stream>>>(problem, g, winners, bad_row);
      } else if (four_fit(problem, gradient, 4 * sizeof(T))) {
        mean_to_cells<T, A, 4><<<Launch(items / 4).blocks, kThreads, 0, stream>>>(problem, g, bad_row);
      } else {
        mean_to_cells<T, A, 1><<<Launch(items).blocks, kThreads, 0, stream>>>(problem, g, bad_row);
      }
      return;
    }
    for (int level = 0; level < problem.levels; ++level) {
      const Map& map = problem.maps[level];
      const int64_t cells = problem.images * map.height * map.width;
      if (cells == 0) continue;  // a launch of no blocks is an error
      const dim3 blocks(static_cast<unsigned>(cells < (1 << 30) ? cells : (1 << 30)),
                        static_cast<unsigned>((problem.channels + kThreads - 1) / kThreads));
      cells_to_bins<T, A><<<blocks, kThreads, 0, stream>>>(problem, level, g, winners, bad_row);
    }
  });
}

}  // namespace mrcnn_edu::cuda
