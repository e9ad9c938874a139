// Which pixels of the image a pasted mask covers, and where in the mask each of them looks.
//
// Chapter 11 and Chapter 9.
#pragma once

#include <cmath>

#include "roi_math.h"

namespace mrcnn_edu {

// One axis of one box: pixels begin to end of the image are set; pixel p looks at mask position (p + 0.5 - low) * ratio.
struct PasteAxis {
  double low;
  float ratio;  // mask cells per pixel
  int64_t begin, end;
};

MRCNN_HOST_DEVICE int64_t pixel_between(double value, int64_t pixels) {
  return static_cast<int64_t>(std::fmin(std::fmax(value, 0.0), static_cast<double>(pixels)));
}

// `side` is that of the mask, with its ring of zeros under the integer rule.
MRCNN_HOST_DEVICE PasteAxis paste_axis(float low, float high, int64_t side, int64_t pixels, bool integer) {
  PasteAxis axis;
  if (integer) {  // the box grows as the ring of zeros asks, and is cut to its first and its last whole pixel
    const float grow = static_cast<float>(double(side) / (side - 2));
    const float half = (high - low) * 0.5f * grow, centre = (high + low) * 0.5f;
    const double first = std::trunc(centre - half), last = std::trunc(centre + half);
    axis.low = first;
    axis.ratio = float(side) / static_cast<float>(std::fmax(last - first + 1, 1.0));
    axis.begin = pixel_between(first, pixels);
    axis.end = pixel_between(last + 1, pixels);
  } else {  // a pixel belongs to the box when its centre does
    axis.low = low;
    axis.ratio = static_cast<float>(side / std::fmax(double(high) - low, 1e-30));
    axis.begin = pixel_between(std::ceil(low - 0.5), pixels);
    axis.end = pixel_between(std::ceil(high - 0.5), pixels);
  }
  if (axis.end < axis.begin) axis.end = axis.begin;
  return axis;
}

// The two mask cells around a pixel, and the weight of the second. The mask's border cells reach to its edge.
struct PasteTaps {
  int64_t low, high;
  float part;
};

MRCNN_HOST_DEVICE PasteTaps paste_taps(const PasteAxis& axis, int64_t pixel, int64_t side) {
  const float inside = static_cast<float>(pixel + 0.5 - axis.low);
  const float position = std::fmin(std::fmax(inside * axis.ratio - 0.5f, 0.0f), static_cast<float>(side - 1));
  const int64_t low = static_cast<int64_t>(position);
  return {low, low + 1 < side ? low + 1 : low, position - static_cast<float>(low)};
}

MRCNN_HOST_DEVICE float blend(float a, float b, float part) { return a + (b - a) * part; }

}  // namespace mrcnn_edu
