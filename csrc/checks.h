// From PyTorch's tensors to the kernels' plain numbers, with every check that memory safety needs.
//
// Chapter 9. The sentences for users stand in mrcnn_edu/ops/checks.py; but these ops, the backward ones too, can be
// called directly, so nothing that could lead a kernel out of its memory is taken on trust.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>

#include "roi_problem.h"

namespace mrcnn_edu {

// What stays the same for all levels.
struct RoiOptions {
  int64_t layer, bins_y, bins_x, samples_per_bin;
  bool aligned, maximum;
};

inline int checked_int(int64_t value, int64_t least, const char* name) {
  TORCH_CHECK_VALUE(value >= least && value <= std::numeric_limits<int>::max(), name, " must be ", least,
                    " to 2^31 - 1, got ", value);
  return static_cast<int>(value);
}

inline void check_map_size(int64_t images, int64_t channels, int64_t height, int64_t width, bool maximum) {
  TORCH_CHECK_VALUE(images >= 0 && channels >= 0, "a feature map cannot have ", images, " images or ", channels,
                    " channels");
  TORCH_CHECK_VALUE(!maximum || height * width <= std::numeric_limits<int32_t>::max(),
                    "the maximum is taken on maps of fewer than 2^31 cells, got ", height, " x ", width);
}

// Everything but the maps themselves.
inline RoiProblem describe(
    const at::Tensor& rois, const at::Tensor& levels, at::ArrayRef<double> scales, int64_t images, int64_t channels,
    at::IntArrayRef heights, at::IntArrayRef widths, const RoiOptions& options) {
  TORCH_CHECK_VALUE(rois.dim() == 2 && rois.size(1) == 5, "rois must be [R, 5], got ", rois.sizes());
  TORCH_CHECK_TYPE(rois.scalar_type() == at::kFloat, "rois must be float32, got ", rois.scalar_type());
  TORCH_CHECK_VALUE(levels.dim() == 1 && levels.size(0) == rois.size(0), "one level per roi is needed, got ",
                    rois.size(0), " rois and levels ", levels.sizes());
  TORCH_CHECK_TYPE(levels.scalar_type() == at::kLong, "levels must be int64, got ", levels.scalar_type());
  TORCH_CHECK_VALUE(rois.is_contiguous() && levels.is_contiguous(), "rois and levels must be contiguous");
  TORCH_CHECK_VALUE(levels.device() == rois.device(), "rois and levels must be on one device");
  TORCH_CHECK_VALUE(heights.size() == scales.size() && widths.size() == scales.size() && !scales.empty() &&
                        scales.size() <= kMaxLevels,
                    "1 to ", kMaxLevels, " maps, each with a scale, are needed, got ", heights.size(), " heights, ",
                    widths.size(), " widths and ", scales.size(), " scales");
  TORCH_CHECK_VALUE(options.layer >= 0 && options.layer <= 2, "layer must be 0, 1 or 2, got ", options.layer);
  TORCH_CHECK_VALUE(options.samples_per_bin >= 0 && options.samples_per_bin <= kMaxSamples,
                    "samples_per_bin must be 0 to ", kMaxSamples, ", got ", options.samples_per_bin);

  RoiProblem problem{};
  problem.layer = static_cast<Layer>(options.layer);
  problem.aligned = options.aligned;
  problem.maximum = options.maximum;
  problem.samples_per_bin = static_cast<int>(options.samples_per_bin);
  problem.bins_y = checked_int(options.bins_y, 1, "the output height");
  problem.bins_x = checked_int(options.bins_x, 1, "the output width");
  problem.images = images;
  problem.channels = channels;
  problem.rois = rois.size(0);
  problem.roi = rois.const_data_ptr<float>();
  problem.level = levels.const_data_ptr<int64_t>();
  problem.levels = static_cast<int>(scales.size());
  for (size_t i = 0; i < scales.size(); ++i) {
    problem.maps[i] = {nullptr, checked_int(heights[i], 1, "the height of a map"),
                       checked_int(widths[i], 1, "the width of a map"), scales[i]};
    check_map_size(images, channels, heights[i], widths[i], options.maximum);
    TORCH_CHECK_VALUE(std::isfinite(scales[i]) && scales[i] > 0, "a scale must be positive, got ", scales[i]);
  }
  return problem;
}

inline RoiProblem describe(
    const at::TensorList features, const at::Tensor& rois, const at::Tensor& levels, at::ArrayRef<double> scales,
    const RoiOptions& options) {
  TORCH_CHECK_VALUE(!features.empty(), "at least one feature map is needed");
  std::vector<int64_t> heights, widths;
  for (const at::Tensor& map : features) {
    TORCH_CHECK_VALUE(map.dim() == 4, "a feature map must be [B, C, H, W], got ", map.sizes());
    TORCH_CHECK_VALUE(map.size(0) == features[0].size(0) && map.size(1) == features[0].size(1) &&
                          map.scalar_type() == features[0].scalar_type() && map.device() == rois.device(),
                      "all feature maps need the same B, C, dtype and the device of the rois");
    heights.push_back(map.size(2));
    widths.push_back(map.size(3));
  }
  return describe(rois, levels, scales, features[0].size(0), features[0].size(1), heights, widths, options);
}

// Are all maps channels last, and not at the same time contiguous (as with one channel)? Then so are the results.
inline bool all_channels_last(const at::TensorList features) {
  for (const at::Tensor& map : features) {
    if (map.is_contiguous() || !map.is_contiguous(at::MemoryFormat::ChannelsLast)) return false;
  }
  return true;
}

inline void check_gradient(
    const at::Tensor& gradient, const at::Tensor& winners, const RoiProblem& problem) {
  const std::vector<int64_t> sizes{problem.rois, problem.channels, problem.bins_y, problem.bins_x};
  TORCH_CHECK_VALUE(gradient.sizes() == at::IntArrayRef(sizes), "the gradient must be ", at::IntArrayRef(sizes),
                    ", got ", gradient.sizes());
  TORCH_CHECK_VALUE(!problem.maximum || (winners.numel() == gradient.numel() && winners.is_contiguous()),
                    "winners must be contiguous with ", gradient.numel(), " numbers, got ", winners.sizes());
  TORCH_CHECK_TYPE(winners.scalar_type() == at::kInt, "winners must be int32, got ", winners.scalar_type());
  TORCH_CHECK_VALUE(winners.device() == gradient.device(), "winners and gradient must be on one device");
}

inline void check_boxes(const at::Tensor& boxes) {
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4, "boxes must be [N, 4], got ", boxes.sizes());
  TORCH_CHECK_TYPE(boxes.scalar_type() == at::kFloat, "boxes must be float32, got ", boxes.scalar_type());
}

// Boxes [N, 4] or scores [N] in host memory.
inline void check_finite(const char* name, const at::Tensor& rows) {
  const at::Tensor values = rows.to(at::kDouble).contiguous();
  const double* value = values.const_data_ptr<double>();
  const int64_t per_row = rows.dim() == 2 ? rows.size(1) : 1;
  for (int64_t i = 0; i < values.numel(); ++i) {
    TORCH_CHECK_VALUE(std::isfinite(value[i]), name, "[", i / per_row, "] is not finite (", value[i],
                      "); drop such rows first");
  }
}

inline void check_nms(
    const at::Tensor& boxes, const at::Tensor& scores, const std::optional<at::Tensor>& groups, double threshold,
    std::optional<int64_t> max_keep) {
  check_boxes(boxes);
  TORCH_CHECK_VALUE(scores.dim() == 1 && scores.size(0) == boxes.size(0) && scores.is_floating_point(),
                    "scores must be [", boxes.size(0), "] floating point, got ", scores.sizes(), " ",
                    scores.scalar_type());
  TORCH_CHECK_VALUE(!groups || (groups->dim() == 1 && groups->size(0) == boxes.size(0)),
                    "one group per box is needed");
  TORCH_CHECK_TYPE(!groups || groups->scalar_type() == at::kLong, "groups must be int64");
  TORCH_CHECK_VALUE(scores.device() == boxes.device() && (!groups || groups->device() == boxes.device()),
                    "boxes, scores and groups must be on one device");
  TORCH_CHECK_VALUE(threshold >= 0 && threshold <= 1, "threshold must be 0 to 1, got ", threshold);
  TORCH_CHECK_VALUE(!max_keep || *max_keep >= 0, "max_keep must not be negative");
}

inline void check_paste(const at::Tensor& masks, const at::Tensor& boxes, int64_t height, int64_t width) {
  check_boxes(boxes);
  TORCH_CHECK_VALUE(masks.dim() == 3 && masks.size(1) == masks.size(2) && masks.size(1) >= 1 &&
                        masks.size(0) == boxes.size(0),
                    "masks must be [", boxes.size(0), ", M, M], got ", masks.sizes());
  TORCH_CHECK_TYPE(masks.scalar_type() == at::kFloat, "masks must be float32, got ", masks.scalar_type());
  TORCH_CHECK_VALUE(masks.device() == boxes.device(), "masks and boxes must be on one device");
  checked_int(height, 1, "the height of the image");
  checked_int(width, 1, "the width of the image");
}

}  // namespace mrcnn_edu
