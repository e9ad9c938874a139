// RoI layers on CUDA, forward.
//
// Chapter 9. One thread computes one row of bins of one RoI for a few neighbouring channels, or one bin of it where
// there are few RoIs. Maps are channels last, so that the threads of a warp read one stretch of memory, sixteen bytes
// each.
#include "kernels.h"
#include "numbers.cuh"

namespace mrcnn_edu::cuda {
namespace {

// One bin of any number of samples.
template <typename T, typename A, int V>
__device__ void add_samples(
    A (&sum)[V], const Samples<A>& ys, const Samples<A>& xs, const Axis<A>& y_axis, const Axis<A>& x_axis,
    const T* cells, int64_t row, int64_t column) {
  for (int i = 0; i < ys.count; ++i) {
    const Taps<A> y = taps_at(ys.position(i), y_axis.cells);
    if (y.low_weight + y.high_weight == A(0)) continue;  // off the map
    for (int j = 0; j < xs.count; ++j) {
      const Taps<A> x = taps_at(xs.position(j), x_axis.cells);
      if (x.low_weight + x.high_weight == A(0)) continue;
      add(sum, y.low_weight * x.low_weight, cells + y.low * row + x.low * column);
      add(sum, y.low_weight * x.high_weight, cells + y.low * row + x.high * column);
      add(sum, y.high_weight * x.low_weight, cells + y.high * row + x.low * column);
      add(sum, y.high_weight * x.high_weight, cells + y.high * row + x.high * column);
    }
  }
}

template <typename T, typename A, int V>
__global__ void mean_forward(RoiProblem problem, int parts, T* out, BadRow bad_row) {
  const int64_t groups = problem.channels / V;
  const int64_t items = problem.rois * problem.bins_y * parts * groups;
  for (int64_t item = first_item(); item < items; item += item_step()) {
    const Place place = locate(problem, item, groups, parts);
    const int first = parts == 1 ? 0 : place.part, end = parts == 1 ? problem.bins_x : place.part + 1;
    const int64_t line = place.roi * problem.bins_y + place.by;
    Pack<T, V>* result = reinterpret_cast<Pack<T, V>*>(out) + line * problem.bins_x * groups + place.channel;
    if (!problem.is_valid(place.roi)) {
      if (place.channel == 0) *bad_row = static_cast<int>(place.roi) + 1;
      for (int bx = first; bx < end; ++bx) result[bx * groups] = Pack<T, V>::zero();
      continue;
    }
    const Axis<A> y_axis = problem.axis_y<A>(place.roi), x_axis = problem.axis_x<A>(place.roi);
    const Samples<A> ys = samples_of_bin(y_axis, place.by);
    const T* cells = problem.image_cells<const T>(place.roi) + place.channel * V;
    const int64_t column = problem.channels, row = x_axis.cells * column;  // steps between cells
    const bool few = few_samples(y_axis, x_axis);
    const Reads<A> y(ys, few ? y_axis.cells : 0);
    for (int bx = first; bx < end; ++bx) {
      const Samples<A> xs = samples_of_bin(x_axis, bx);
      A sum[V] = {};
      if (few) {
        const Reads<A> x(xs, x_axis.cells);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (y.weight[i] == A(0)) continue;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (x.weight[j] == A(0)) continue;
            add(sum, y.weight[i] * x.weight[j], cells + y.cell[i] * row + x.cell[j] * column);
          }
        }
      } else {
        add_samples<T, A, V>(sum, ys, xs, y_axis, x_axis, cells, row, column);
      }
      const A count = A(ys.count) * A(xs.count);
      Pack<T, V> mean;
      for (int v = 0; v < V; ++v) mean.value[v] = from_sum<T>(count > A(0) ? sum[v] / count : A(0));
      result[bx * groups] = mean;
    }
  }
}

// The largest sample of a bin, and which it is; -1 where there is none.
template <typename A>
struct Best {
  A value;
  int32_t sample;
};

template <typename T, typename A>
__device__ Best<A> best_of_bin(const RoiProblem& problem, const Place& place, int bx) {
  const Axis<A> y_axis = problem.axis_y<A>(place.roi), x_axis = problem.axis_x<A>(place.roi);
  const Samples<A> ys = samples_of_bin(y_axis, place.by), xs = samples_of_bin(x_axis, bx);
  const T* cells = problem.image_cells<const T>(place.roi) + place.channel;
  const int64_t column = problem.channels, row = x_axis.cells * column;
  Best<A> best{A(0), -1};
  int32_t sample = 0;
  for (int i = 0; i < ys.count; ++i) {
    const Taps<A> y = taps_at(ys.position(i), y_axis.cells);
    for (int j = 0; j < xs.count; ++j, ++sample) {
      const Taps<A> x = taps_at(xs.position(j), x_axis.cells);
      A value = to_sum<A>(cells[y.low * row + x.low * column]);
      if (!ys.whole_cells) {
        value = (y.low_weight * x.low_weight * value +
                 y.low_weight * x.high_weight * to_sum<A>(cells[y.low * row + x.high * column])) +
                (y.high_weight * x.low_weight * to_sum<A>(cells[y.high * row + x.low * column]) +
                 y.high_weight * x.high_weight * to_sum<A>(cells[y.high * row + x.high * column]));
      }
      if (best.sample < 0 || value > best.value || (value != value && best.value == best.value)) best = {value, sample};
    }
  }
  return best;
}

template <typename T, typename A>
__global__ void max_forward(RoiProblem problem, T* out, int32_t* winners, BadRow bad_row) {
  const int64_t items = problem.rois * problem.bins_y * problem.channels;
  for (int64_t item = first_item(); item < items; item += item_step()) {
    const Place place = locate(problem, item, problem.channels);
    const int64_t first = (place.roi * problem.bins_y + place.by) * problem.bins_x * problem.channels + place.channel;
    const bool valid = problem.is_valid(place.roi);
    if (!valid && place.channel == 0) *bad_row = static_cast<int>(place.roi) + 1;
    for (int bx = 0; bx < problem.bins_x; ++bx) {
      const Best<A> best = valid ? best_of_bin<T, A>(problem, place, bx) : Best<A>{A(0), -1};
      out[first + bx * problem.channels] = from_sum<T>(best.value);
      winners[first + bx * problem.channels] = best.sample;
    }
  }
}
bool sixteen_byte_rows(const RoiProblem& problem, const void* out, int per_row) {
  bool fits = problem.channels % per_row == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  for (int i = 0; i < problem.levels; ++i) fits &= reinterpret_cast<uintptr_t>(problem.maps[i].cells) % 16 == 0;
  return fits;
}

}  // namespace

void roi_mean_forward(const RoiProblem& problem, Number number, void* out, BadRow bad_row, cudaStream_t stream) {
  for_number(number, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    constexpr int kPack = 16 / sizeof(T);
    const bool together = sixteen_byte_rows(problem, out, kPack);
    const int64_t rows = problem.rois * problem.bins_y * problem.channels / (together ? kPack : 1);
    const int parts = rows < kThreadsAtOnce ? problem.bins_x : 1;
    const auto kernel = together ? mean_forward<T, A, kPack> : mean_forward<T, A, 1>;
    kernel<<<Launch(rows * parts).blocks, kThreads, 0, stream>>>(problem, parts, static_cast<T*>(out), bad_row);
  });
}

void roi_max_forward(
    const RoiProblem& problem, Number number, void* out, int32_t* winners, BadRow bad_row, cudaStream_t stream) {
  for_number(number, [&](auto t, auto a) {
    using T = decltype(t);
    const Launch launch(problem.rois * problem.bins_y * problem.channels);
    max_forward<T, decltype(a)><<<launch.blocks, kThreads, 0, stream>>>(
        problem, static_cast<T*>(out), winners, bad_row);
  });
}

}  // namespace mrcnn_edu::cuda
