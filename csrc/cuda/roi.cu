// RoI layers on CUDA, forward.
//
// Chapter 9. One thread computes one bin of one RoI for a few neighbouring channels. Maps are channels last, so that the
// threads of a warp read one stretch of memory, sixteen bytes each.
#include "kernels.h"
#include "numbers.cuh"

namespace mrcnn_edu::cuda {
namespace {

template <typename T, typename A, int V>
__global__ void mean_forward(RoiProblem problem, T* out, BadRow bad_row) {
  const int64_t groups = problem.channels / V;
  const int64_t items = problem.rois * problem.bins_y * problem.bins_x * groups;
  for (int64_t item = first_item(); item < items; item += item_step()) {
    const Place place = locate(problem, item, groups);
    Pack<T, V>* result = reinterpret_cast<Pack<T, V>*>(out) + item;
    if (!problem.is_valid(place.roi)) {
      if (place.channel == 0) *bad_row = static_cast<int>(place.roi) + 1;
      *result = Pack<T, V>::zero();
      continue;
    }
    const Axis<A> y_axis = problem.axis_y<A>(place.roi), x_axis = problem.axis_x<A>(place.roi);
    const Samples<A> ys = samples_of_bin(y_axis, place.by), xs = samples_of_bin(x_axis, place.bx);
    const T* cells = problem.image_cells<const T>(place.roi) + place.channel * V;
    const int64_t column = problem.channels, row = x_axis.cells * column;  // steps between cells

    A sum[V] = {};
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
    const A count = A(ys.count) * A(xs.count);
    for (int v = 0; v < V; ++v) result->value[v] = from_sum<T>(count > A(0) ? sum[v] / count : A(0));
  }
}

template <typename T, typename A>
__global__ void max_forward(RoiProblem problem, T* out, int32_t* winners, BadRow bad_row) {
  const int64_t items = problem.rois * problem.bins_y * problem.bins_x * problem.channels;
  for (int64_t item = first_item(); item < items; item += item_step()) {
    const Place place = locate(problem, item, problem.channels);
    A best = A(0);
    int32_t winner = -1, sample = 0;
    if (problem.is_valid(place.roi)) {
      const Axis<A> y_axis = problem.axis_y<A>(place.roi), x_axis = problem.axis_x<A>(place.roi);
      const Samples<A> ys = samples_of_bin(y_axis, place.by), xs = samples_of_bin(x_axis, place.bx);
      const T* cells = problem.image_cells<const T>(place.roi) + place.channel;
      const int64_t column = problem.channels, row = x_axis.cells * column;
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
          if (winner < 0 || value > best || (value != value && best == best)) best = value, winner = sample;
        }
      }
    } else if (place.channel == 0) {
      *bad_row = static_cast<int>(place.roi) + 1;
    }
    out[item] = from_sum<T>(best);
    winners[item] = winner;
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
    const int64_t bins = problem.rois * problem.bins_y * problem.bins_x;
    if (sixteen_byte_rows(problem, out, kPack)) {
      const Launch launch(bins * problem.channels / kPack);
      mean_forward<T, A, kPack><<<launch.blocks, kThreads, 0, stream>>>(problem, static_cast<T*>(out), bad_row);
    } else {
      const Launch launch(bins * problem.channels);
      mean_forward<T, A, 1><<<launch.blocks, kThreads, 0, stream>>>(problem, static_cast<T*>(out), bad_row);
    }
  });
}

void roi_max_forward(
    const RoiProblem& problem, Number number, void* out, int32_t* winners, BadRow bad_row, cudaStream_t stream) {
  for_number(number, [&](auto t, auto a) {
    using T = decltype(t);
    const Launch launch(problem.rois * problem.bins_y * problem.bins_x * problem.channels);
    max_forward<T, decltype(a)><<<launch.blocks, kThreads, 0, stream>>>(
        problem, static_cast<T*>(out), winners, bad_row);
  });
}

}  // namespace mrcnn_edu::cuda
