// The CPU kernels: functions of plain pointers. T is the type of the maps, A the type sums are kept in.
#pragma once

#include <vector>

#include "../roi_problem.h"

namespace mrcnn_edu {

// RoIs in an order that finds neighbours in the cache: by level, image, band of rows, column.
std::vector<int64_t> order_of_visit(const RoiProblem& problem);

// Maps channels last, or planes: [images, channels, height, width]; so is out, [rois, bins_y, bins_x, channels] or
// planes: [rois, channels, bins_y, bins_x]. The same bits in every case.
template <typename T, typename A>
void roi_mean_forward(const RoiProblem& problem, bool planes, bool planes_out, T* out);

// The same for up to so many channels, where a cell is too short a row of numbers. Planes only, in and out.
constexpr int64_t kFewChannels = 7;
template <typename T, typename A>
void roi_mean_forward_few_channels(const RoiProblem& problem, T* out);

// winners [rois, bins_y, bins_x, channels]: which sample of the bin was the largest, -1 where there is none.
template <typename T, typename A>
void roi_max_forward(const RoiProblem& problem, T* out, int32_t* winners);

// The maps are zeros of type A to which the gradient [rois, bins_y, bins_x, channels] is added.
template <typename T, typename A>
void roi_mean_backward(const RoiProblem& problem, const T* gradient);
template <typename T, typename A>
void roi_max_backward(const RoiProblem& problem, const T* gradient, const int32_t* winners);

// Rows of `boxes` [count, 4] kept by greedy NMS, best first. All numbers are finite; group may be null.
std::vector<int64_t> nms(
    const float* boxes, const double* scores, const int64_t* group, int64_t count, double threshold, int64_t max_keep);

// The pixels one mask can set: rows [top, bottom), columns [left, right) of the image.
struct Window {
  int64_t top, left, bottom, right;
};
Window paste_window(const float* box, int64_t side, int64_t height, int64_t width, bool integer);

// Writes a mask [side, side] into its window; `first` is the window's first pixel, rows are `stride` pixels apart.
template <typename Pixel>
void paste_mask(
    const float* mask, const float* box, int64_t side, const Window& window, double threshold, bool integer,
    Pixel* first, int64_t stride);

}  // namespace mrcnn_edu
