// The arithmetic of the paper's Table 2c: RoIPool, RoIWarp and RoIAlign as three settings of one computation.
//
// Chapter 9. Paper: Section 3, RoIAlign. The CPU and the CUDA kernels both include this file, so they cannot disagree.
//
// A RoI layer treats its two axes alike and separately. Along one axis it answers, for every bin: where are the
// samples, and between which two cells does each lie?
//
//                RoI rounded to cells   bins rounded to cells   samples
//   RoIPool      yes                    yes                     the cells themselves
//   RoIWarp      yes                    no                      between cells, bilinear
//   RoIAlign     no                     no                      between cells, bilinear
//
// Positions are in cell indices: the centre of cell i is at position i. T is float, or double for double maps.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MRCNN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MRCNN_HOST_DEVICE inline
#endif

namespace mrcnn_edu {

enum class Layer : int { roi_pool = 0, roi_warp = 1, roi_align = 2 };

// Adaptive sampling takes about one sample per cell; this bounds what a huge RoI can ask for, per side of a bin.
constexpr int kMaxSamples = 256;

// One axis of one RoI on its map.
template <typename T>
struct Axis {
  Layer layer;
  int cells;  // of the map
  int bins;   // of the output
  // RoIPool and RoIWarp: the RoI in whole cells.
  int64_t first, length;
  // RoIWarp and RoIAlign: where the first bin begins, how large a bin is, and its number of samples.
  T start, bin_size;
  int samples;
};

// The samples of one bin: at begin + i for whole cells, else evenly inside [begin, begin + size).
template <typename T>
struct Samples {
  bool whole_cells;
  T begin, size;
  int count;

  MRCNN_HOST_DEVICE T position(int i) const {
    return whole_cells ? begin + T(i) : begin + (T(i) + T(0.5)) * size / T(count);
  }
};

// A sample's value is low_weight * map[low] + high_weight * map[high].
template <typename T>
struct Taps {
  int low, high;
  T low_weight, high_weight;
};

// std::round sends halves away from zero. The bounds keep the conversion defined for any finite number.
template <typename T>
MRCNN_HOST_DEVICE int64_t round_to_cell(T position) {
  const T bound = T(1 << 30);
  return static_cast<int64_t>(std::fmin(std::fmax(std::round(position), -bound), bound));
}

// low and high are the RoI's two edges in image pixels, scale is 1 / stride.
template <typename T>
MRCNN_HOST_DEVICE Axis<T> make_axis(
    Layer layer, float low, float high, double scale, int bins, int cells, int samples_per_bin, bool aligned) {
  Axis<T> axis{layer, cells, bins, 0, 0, 0, 0, 0};
  const T low_edge = T(low) * T(scale), high_edge = T(high) * T(scale);

  T length;
  if (layer == Layer::roi_align) {
    const T half_cell = aligned ? T(0.5) : T(0);  // from the corner of cell 0 to its centre
    axis.start = low_edge - half_cell;
    length = high_edge - half_cell - axis.start;
    if (!aligned) length = std::fmax(length, T(1));
  } else {
    axis.first = round_to_cell(low_edge);
    axis.length = round_to_cell(high_edge) - axis.first + 1;
    if (axis.length < 1) axis.length = 1;
    axis.start = T(axis.first) - T(0.5);
    length = T(axis.length);
  }

  axis.bin_size = length / T(bins);
  const T adaptive = std::fmin(std::fmax(std::ceil(axis.bin_size), T(0)), T(kMaxSamples));
  axis.samples = samples_per_bin > 0 ? samples_per_bin : static_cast<int>(adaptive);
  return axis;
}

template <typename T>
MRCNN_HOST_DEVICE Samples<T> samples_of_bin(const Axis<T>& axis, int bin) {
  if (axis.layer != Layer::roi_pool) {
    return {false, axis.start + T(bin) * axis.bin_size, axis.bin_size, axis.samples};
  }
  // Exact fractions in integers: the bin's edges rounded outwards, then cut off at the border of the map.
  int64_t begin = axis.first + bin * axis.length / axis.bins;
  int64_t end = axis.first + ((bin + 1) * axis.length + axis.bins - 1) / axis.bins;
  begin = begin < 0 ? 0 : begin;
  end = end > axis.cells ? axis.cells : end;
  return {true, T(begin), T(0), end > begin ? static_cast<int>(end - begin) : 0};
}

// The border continues for one cell around the map; further out there is nothing. Written as "not inside", so that a
// position that is not a number counts as outside.
template <typename T>
MRCNN_HOST_DEVICE Taps<T> taps_at(T position, int cells) {
  if (!(position >= T(-1) && position <= T(cells))) return {0, 0, T(0), T(0)};
  position = std::fmin(std::fmax(position, T(0)), T(cells - 1));
  const int low = static_cast<int>(position);
  const int high = low + 1 < cells ? low + 1 : low;
  const T part = position - T(low);
  return {low, high, T(1) - part, part};
}

}  // namespace mrcnn_edu
