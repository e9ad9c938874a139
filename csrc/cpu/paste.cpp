// Putting predicted masks into the image, on the CPU.
//
// Chapter 11. Only the pixels of the box are touched, and the mask's probabilities are compared with the threshold
// where they arise: no image of floating point numbers is ever made.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace mrcnn_edu {
namespace {

// One axis of a box, in whichever rule: where it lies in the image, and how image pixels fall onto mask cells.
struct PasteAxis {
  double low;    // image position where the mask begins
  float ratio;   // mask cells per image pixel
  int64_t begin, end;  // image pixels to set
};

int64_t pixel_between(double value, int64_t pixels) {
  return static_cast<int64_t>(std::min(std::max(value, 0.0), static_cast<double>(pixels)));
}

PasteAxis paste_axis(float low, float high, int64_t side, int64_t pixels, bool integer) {
  if (!integer) {  // a pixel belongs to the box when its centre does
    const double ratio = side / std::max(double(high) - low, 1e-30);
    return {low, static_cast<float>(ratio), pixel_between(std::ceil(low - 0.5), pixels),
            pixel_between(std::ceil(high - 0.5), pixels)};
  }
  // The mask has a ring of zeros; the box grows by the same share and is cut to whole pixels, its first and its last.
  const float grow = static_cast<float>(double(side) / (side - 2));
  const float half = (high - low) * 0.5f * grow, centre = (high + low) * 0.5f;
  const double first = std::trunc(centre - half), last = std::trunc(centre + half);
  const float extent = static_cast<float>(std::max(last - first + 1, 1.0));
  return {first, float(side) / extent, pixel_between(first, pixels), pixel_between(last + 1, pixels)};
}

// The two mask cells around each pixel of the axis, and the weight of the second.
struct Cells {
  std::vector<int64_t> low, high;
  std::vector<float> part;

  Cells(const PasteAxis& axis, int64_t side, int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const float inside = static_cast<float>(pixel + 0.5 - axis.low);
      const float position = std::fmin(std::fmax(inside * axis.ratio - 0.5f, 0.0f), static_cast<float>(side - 1));
      const int64_t cell = static_cast<int64_t>(position);
      low.push_back(cell);
      high.push_back(std::min(cell + 1, side - 1));
      part.push_back(position - static_cast<float>(cell));
    }
  }
};

template <typename Pixel>
Pixel to_pixel(float probability, double threshold);
template <>
float to_pixel(float probability, double) { return probability; }
template <>
bool to_pixel(float probability, double threshold) { return probability >= threshold; }

}  // namespace

Window paste_window(const float* box, int64_t side, int64_t height, int64_t width, bool integer) {
  const PasteAxis y = paste_axis(box[1], box[3], side, height, integer);
  const PasteAxis x = paste_axis(box[0], box[2], side, width, integer);
  return {y.begin, x.begin, std::max(y.begin, y.end), std::max(x.begin, x.end)};
}

template <typename Pixel>
void paste_mask(
    const float* mask, const float* box, int64_t side, const Window& window, double threshold, bool integer,
    Pixel* first, int64_t stride) {
  const PasteAxis y_axis = paste_axis(box[1], box[3], side, window.bottom, integer);
  const PasteAxis x_axis = paste_axis(box[0], box[2], side, window.right, integer);
  const Cells ys(y_axis, side, window.top, window.bottom), xs(x_axis, side, window.left, window.right);
  const int64_t columns = window.right - window.left;
  std::vector<float> line(side);
  for (int64_t y = 0; y < window.bottom - window.top; ++y) {
    const float *above = mask + ys.low[y] * side, *below = mask + ys.high[y] * side;
    for (int64_t m = 0; m < side; ++m) line[m] = above[m] + (below[m] - above[m]) * ys.part[y];
    Pixel* pixel = first + y * stride;
    for (int64_t x = 0; x < columns; ++x) {
      const float left = line[xs.low[x]], right = line[xs.high[x]];
      pixel[x] = to_pixel<Pixel>(left + (right - left) * xs.part[x], threshold);
    }
  }
}

template void paste_mask<bool>(const float*, const float*, int64_t, const Window&, double, bool, bool*, int64_t);
template void paste_mask<float>(const float*, const float*, int64_t, const Window&, double, bool, float*, int64_t);

}  // namespace mrcnn_edu
