// Putting predicted masks into the image, on CUDA: one row of blocks per mask, one thread per pixel of its window.
//
// Chapter 11 and Chapter 9.
#include "../paste_math.h"
#include "kernels.h"

namespace mrcnn_edu::cuda {
namespace {

__global__ void paste_masks(
    const float* mask, const float* box, int64_t masks, int64_t side, int64_t height, int64_t width, double threshold,
    bool integer, const int64_t* begin, bool* set, float* probability, BadRow bad_row) {
  for (int64_t n = blockIdx.y; n < masks; n += gridDim.y) {
    bool finite = true;
    for (int k = 0; k < 4; ++k) finite = finite && std::isfinite(box[4 * n + k]);
    if (!finite) {
      *bad_row = static_cast<int>(n) + 1;
      continue;
    }
    const PasteAxis y_axis = paste_axis(box[4 * n + 1], box[4 * n + 3], side, height, integer);
    const PasteAxis x_axis = paste_axis(box[4 * n], box[4 * n + 2], side, width, integer);
    const int64_t columns = x_axis.end - x_axis.begin;
    const int64_t pixels = (y_axis.end - y_axis.begin) * columns;
    const float* cells = mask + n * side * side;
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < pixels; i += step) {
      const int64_t y = y_axis.begin + i / columns, x = x_axis.begin + i % columns;
      const PasteTaps row = paste_taps(y_axis, y, side), column = paste_taps(x_axis, x, side);
      const float left = blend(cells[row.low * side + column.low], cells[row.high * side + column.low], row.part);
      const float right = blend(cells[row.low * side + column.high], cells[row.high * side + column.high], row.part);
      const float value = blend(left, right, column.part);
      const int64_t place = begin != nullptr ? begin[n] + i : (n * height + y) * width + x;
      if (set != nullptr) set[place] = value >= threshold;
      else probability[place] = value;
    }
  }
}

}  // namespace

void paste(
    const float* mask, const float* box, int64_t masks, int64_t side, int64_t height, int64_t width, double threshold,
    bool integer, const int64_t* begin, bool* set, float* probability, BadRow bad_row, cudaStream_t stream) {
  const unsigned rows = static_cast<unsigned>(masks < 65535 ? masks : 65535);
  paste_masks<<<dim3(32, rows), 256, 0, stream>>>(
      mask, box, masks, side, height, width, threshold, integer, begin, set, probability, bad_row);
}

}  // namespace mrcnn_edu::cuda
