// Putting predicted masks into the image, on the CPU.
//
// Chapter 11. Only the pixels of the box are touched, and the mask's probabilities are compared with the threshold
// where they arise: no image of floating point numbers is ever made.
#include "../paste_math.h"
#include "kernels.h"

namespace mrcnn_edu {
namespace {

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
  return {y.begin, x.begin, y.end, x.end};
}

template <typename Pixel>
void paste_mask(
    const float* mask, const float* box, int64_t side, const Window& window, double threshold, bool integer,
    Pixel* first, int64_t stride) {
  const PasteAxis y_axis = paste_axis(box[1], box[3], side, window.bottom, integer);
  const PasteAxis x_axis = paste_axis(box[0], box[2], side, window.right, integer);
  std::vector<PasteTaps> columns;
  for (int64_t x = window.left; x < window.right; ++x) columns.push_back(paste_taps(x_axis, x, side));
  std::vector<float> line(side);
  for (int64_t y = window.top; y < window.bottom; ++y) {
    const PasteTaps row = paste_taps(y_axis, y, side);
    const float *above = mask + row.low * side, *below = mask + row.high * side;
    for (int64_t m = 0; m < side; ++m) line[m] = blend(above[m], below[m], row.part);
    Pixel* pixel = first + (y - window.top) * stride;
    for (const PasteTaps& column : columns) {
      *pixel++ = to_pixel<Pixel>(blend(line[column.low], line[column.high], column.part), threshold);
    }
  }
}

template void paste_mask<bool>(const float*, const float*, int64_t, const Window&, double, bool, bool*, int64_t);
template void paste_mask<float>(const float*, const float*, int64_t, const Window&, double, bool, float*, int64_t);

}  // namespace mrcnn_edu
