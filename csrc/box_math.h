// When does one box suppress another? The same answer on the CPU and on CUDA, to the bit.
//
// Chapter 7 and Chapter 9.
#pragma once

#include <cmath>

#include "roi_math.h"

namespace mrcnn_edu {

struct Box {
  float x1, y1, x2, y2, area;
};

MRCNN_HOST_DEVICE Box make_box(const float* edge) {
  return {edge[0], edge[1], edge[2], edge[3], (edge[2] - edge[0]) * (edge[3] - edge[1])};
}

// Is the intersection over union above the threshold? Two boxes without area have none. Computed in T.
template <typename T>
MRCNN_HOST_DEVICE bool overlaps(const Box& a, const Box& b, T both_areas, double threshold) {
  const T width = T(a.x2 < b.x2 ? a.x2 : b.x2) - T(a.x1 > b.x1 ? a.x1 : b.x1);
  const T height = T(a.y2 < b.y2 ? a.y2 : b.y2) - T(a.y1 > b.y1 ? a.y1 : b.y1);
  if (!(width > T(0) && height > T(0))) return false;
  const T shared = width * height;
  const T together = both_areas - shared;
  return together > T(0) && shared / together > threshold;
}

// In float32, as every implementation has it; in double only where the areas leave float32's range.
MRCNN_HOST_DEVICE bool suppresses(const Box& kept, const Box& box, double threshold) {
  const float areas = kept.area + box.area;
  if (std::isfinite(areas)) return overlaps<float>(kept, box, areas, threshold);
  const double kept_area = (double(kept.x2) - kept.x1) * (double(kept.y2) - kept.y1);
  const double area = (double(box.x2) - box.x1) * (double(box.y2) - box.y1);
  return overlaps<double>(kept, box, kept_area + area, threshold);
}

}  // namespace mrcnn_edu
