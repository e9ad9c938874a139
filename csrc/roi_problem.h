// What a RoI kernel is told: plain numbers and pointers, the same for the CPU and CUDA.
//
// Chapter 9. Kernels know nothing of PyTorch; cpu/ops.cpp and cuda/ops.cpp check tensors and fill this in.
#pragma once

#include "roi_math.h"

namespace mrcnn_edu {

constexpr int kMaxLevels = 8;  // of a feature pyramid

// One level, channels last: [images, height, width, channels]. Read in the forward pass, added to in the backward.
struct Map {
  void* cells;
  int height, width;
  double scale;  // 1 / stride
};

struct RoiProblem {
  Layer layer;
  bool aligned, maximum;
  int samples_per_bin;  // 0: adaptive
  int bins_y, bins_x;
  int64_t images, channels, rois;
  const float* roi;      // [rois, (image, x1, y1, x2, y2)]
  const int64_t* level;  // [rois], index into maps
  int levels;
  Map maps[kMaxLevels];

  template <typename T>
  MRCNN_HOST_DEVICE Axis<T> axis_y(int64_t r) const {
    const Map& map = maps[level[r]];
    return make_axis<T>(
        layer, roi[5 * r + 2], roi[5 * r + 4], map.scale, bins_y, map.height, samples_per_bin, aligned);
  }

  template <typename T>
  MRCNN_HOST_DEVICE Axis<T> axis_x(int64_t r) const {
    const Map& map = maps[level[r]];
    return make_axis<T>(
        layer, roi[5 * r + 1], roi[5 * r + 3], map.scale, bins_x, map.width, samples_per_bin, aligned);
  }

  // The first cell of the RoI's image in its level.
  template <typename T>
  MRCNN_HOST_DEVICE T* image_cells(int64_t r) const {
    const Map& map = maps[level[r]];
    return static_cast<T*>(map.cells) + static_cast<int64_t>(roi[5 * r]) * map.height * map.width * channels;
  }

  // Can this row be worked on without leaving the maps? NaN fails every comparison.
  MRCNN_HOST_DEVICE bool is_valid(int64_t r) const {
    const float* row = roi + 5 * r;
    for (int k = 0; k < 5; ++k) {
      if (!std::isfinite(row[k])) return false;
    }
    return row[0] >= 0 && row[0] < static_cast<float>(images) && row[0] == std::floor(row[0]) && level[r] >= 0 &&
           level[r] < levels;
  }
};

}  // namespace mrcnn_edu
