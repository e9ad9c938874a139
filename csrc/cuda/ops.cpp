// The compiled ops on CUDA: check what can be checked without waiting, allocate, launch on the current stream.
//
// Chapter 9. Values of rois lie on the device; reading them would make the host wait in every step. The kernels skip
// rows that would lead them out of their memory and leave a note, which the next call turns into an error.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "../paste_math.h"
#include "kernels.h"

namespace mrcnn_edu::cuda {
namespace {

using at::MemoryFormat;
using at::Tensor;

Number number_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Number::float32;
    case at::kDouble: return Number::float64;
    case at::kBFloat16: return Number::bfloat16;
    case at::kHalf: return Number::float16;
    default: TORCH_CHECK_TYPE(false, "feature maps must be floating point, got ", type);
  }
}

// One integer of host memory that every device can write to; kept until the process ends.
volatile int* note() {
  static int* const memory = [] {
    void* pointer = nullptr;
    C10_CUDA_CHECK(cudaHostAlloc(&pointer, sizeof(int), cudaHostAllocMapped | cudaHostAllocPortable));
    *static_cast<int*>(pointer) = 0;
    return static_cast<int*>(pointer);
  }();
  return memory;
}

// What kernels have reported so far; does not wait for those still running.
void raise_reported() {
  const int row = *note();
  if (row == 0) return;
  *note() = 0;
  TORCH_CHECK_VALUE(false, "row ", row - 1, " of the rois or boxes given to an op on CUDA was not finite, or named an "
                    "image or level that does not exist; it was skipped");
}

BadRow bad_row() {
  raise_reported();
  return const_cast<int*>(note());
}

std::tuple<Tensor, Tensor> roi_features(
    at::TensorList features, const Tensor& rois_, const Tensor& levels_, at::ArrayRef<double> scales, int64_t layer,
    int64_t bins_y, int64_t bins_x, int64_t samples_per_bin, bool aligned, bool maximum) {
  const c10::cuda::CUDAGuard guard(rois_.device());
  const Tensor rois = rois_.contiguous(), levels = levels_.contiguous();
  RoiProblem problem =
      describe(features, rois, levels, scales, {layer, bins_y, bins_x, samples_per_bin, aligned, maximum});
  std::vector<Tensor> maps;
  for (const Tensor& map : features) {
    maps.push_back(map.contiguous(MemoryFormat::ChannelsLast));
    problem.maps[maps.size() - 1].cells = const_cast<void*>(maps.back().const_data_ptr());
  }
  const std::vector<int64_t> sizes{problem.rois, problem.channels, bins_y, bins_x};
  const auto options = features[0].options();
  Tensor out = at::empty(sizes, options, MemoryFormat::ChannelsLast);
  Tensor winners = at::empty({maximum ? out.numel() : 0}, options.dtype(at::kInt));
  if (out.numel() > 0) {
    const Number number = number_of(features[0].scalar_type());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    if (maximum) {
      roi_max_forward(problem, number, out.mutable_data_ptr(), winners.mutable_data_ptr<int32_t>(), bad_row(), stream);
    } else {
      roi_mean_forward(problem, number, out.mutable_data_ptr(), bad_row(), stream);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (!all_channels_last(features)) out = at::empty(sizes, options).copy_(out);
  return {out, winners};
}

std::vector<Tensor> roi_features_backward(
    const Tensor& gradient, const Tensor& winners, const Tensor& rois_, const Tensor& levels_,
    at::ArrayRef<double> scales, int64_t images, at::IntArrayRef heights, at::IntArrayRef widths, bool channels_last,
    int64_t layer, int64_t samples_per_bin, bool aligned, bool maximum) {
  TORCH_CHECK_VALUE(gradient.dim() == 4, "the gradient must be [R, C, P, P], got ", gradient.sizes());
  TORCH_CHECK_VALUE(gradient.device() == rois_.device(), "the gradient and the rois must be on one device");
  const c10::cuda::CUDAGuard guard(gradient.device());
  const Tensor rois = rois_.contiguous(), levels = levels_.contiguous();
  RoiProblem problem =
      describe(rois, levels, scales, images, gradient.size(1), heights, widths,
               {layer, gradient.size(2), gradient.size(3), samples_per_bin, aligned, maximum});
  check_gradient(gradient, winners, problem);

  const auto type = gradient.scalar_type();
  const auto exact = type == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<Tensor> result;
  for (size_t i = 0; i < heights.size(); ++i) {
    // at::zeros would ignore the memory format
    result.push_back(at::empty({images, problem.channels, heights[i], widths[i]}, gradient.options().dtype(exact),
                               MemoryFormat::ChannelsLast).zero_());
    problem.maps[i].cells = result.back().mutable_data_ptr();
  }
  if (gradient.numel() > 0) {
    const Tensor turned = gradient.contiguous(MemoryFormat::ChannelsLast);
    roi_backward(problem, number_of(type), turned.const_data_ptr(),
                 maximum ? winners.const_data_ptr<int32_t>() : nullptr, at::globalContext().deterministicAlgorithms(),
                 bad_row(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (type != exact || !channels_last) {
    const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
    for (Tensor& map : result) map = at::empty(map.sizes(), map.options().dtype(type), format).copy_(map);
  }
  return result;
}

Tensor nms_op(
    const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups, double threshold,
    std::optional<int64_t> max_keep) {
  check_nms(boxes, scores, groups, threshold, max_keep);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const int64_t count = boxes.size(0), words = (count + 63) / 64;
  TORCH_CHECK_VALUE(words <= 65535, "NMS on CUDA takes at most ", 65535 * 64, " boxes, got ", count);
  const auto indices = boxes.options().dtype(at::kLong);
  if (count == 0) return at::empty({0}, indices);
  const Tensor rows = boxes.contiguous(), usable = at::isfinite(scores).contiguous();
  const Tensor order = std::get<1>(at::sort(scores, /*stable=*/true, /*dim=*/0, /*descending=*/true)).contiguous();
  const Tensor group = groups ? groups->contiguous() : Tensor();
  Tensor overlap = at::empty({count * words}, indices), removed = at::zeros({words}, indices);
  Tensor kept = at::empty({count}, indices), kept_count = at::empty({1}, indices);
  using Word = unsigned long long;
  nms(rows.const_data_ptr<float>(), usable.const_data_ptr<bool>(), order.const_data_ptr<int64_t>(),
      groups ? group.const_data_ptr<int64_t>() : nullptr, count, threshold, max_keep.value_or(count),
      static_cast<Word*>(overlap.mutable_data_ptr()), static_cast<Word*>(removed.mutable_data_ptr()),
      kept.mutable_data_ptr<int64_t>(), kept_count.mutable_data_ptr<int64_t>(), bad_row(),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  // The length of the result has to be known, so this one op waits for the device; its own bad rows are known as well.
  const int64_t length = kept_count.item<int64_t>();
  raise_reported();
  return kept.narrow(0, 0, length).clone();
}

Tensor with_ring_of_zeros(const Tensor& masks, bool integer) {
  if (!integer) return masks.contiguous();
  const int64_t side = masks.size(1);
  Tensor padded = at::zeros({masks.size(0), side + 2, side + 2}, masks.options());
  padded.narrow(1, 1, side).narrow(2, 1, side).copy_(masks);
  return padded;
}

void launch_paste(
    const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, std::optional<double> threshold,
    bool integer, const int64_t* begin, Tensor& pixels) {
  if (pixels.numel() == 0) return;
  paste(masks.const_data_ptr<float>(), boxes.const_data_ptr<float>(), masks.size(0), masks.size(1), height, width,
        threshold.value_or(0), integer, begin, threshold ? pixels.mutable_data_ptr<bool>() : nullptr,
        threshold ? nullptr : pixels.mutable_data_ptr<float>(), bad_row(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor paste_op(
    const Tensor& masks_, const Tensor& boxes_, int64_t height, int64_t width, std::optional<double> threshold,
    bool integer) {
  check_paste(masks_, boxes_, height, width);
  const c10::cuda::CUDAGuard guard(boxes_.device());
  const Tensor masks = with_ring_of_zeros(masks_, integer), boxes = boxes_.contiguous();
  Tensor canvas =
      at::zeros({masks.size(0), height, width}, masks.options().dtype(threshold ? at::kBool : at::kFloat));
  launch_paste(masks, boxes, height, width, threshold, integer, nullptr, canvas);
  return canvas;
}

std::tuple<Tensor, Tensor> paste_crops(
    const Tensor& masks_, const Tensor& boxes_, int64_t height, int64_t width, std::optional<double> threshold,
    bool integer) {
  check_paste(masks_, boxes_, height, width);
  const c10::cuda::CUDAGuard guard(boxes_.device());
  const Tensor masks = with_ring_of_zeros(masks_, integer), boxes = boxes_.contiguous();
  // How large the windows are decides how much memory is needed, so the boxes come to the host first.
  const Tensor on_host = boxes.cpu();
  check_finite("boxes", on_host);
  const int64_t count = masks.size(0), side = masks.size(1);
  Tensor windows = at::empty({count, 4}, on_host.options().dtype(at::kLong));
  Tensor begin = at::empty({count}, windows.options());
  int64_t total = 0;
  for (int64_t n = 0; n < count; ++n) {
    const float* box = on_host.const_data_ptr<float>() + 4 * n;
    const PasteAxis y = paste_axis(box[1], box[3], side, height, integer);
    const PasteAxis x = paste_axis(box[0], box[2], side, width, integer);
    const int64_t numbers[4] = {y.begin, x.begin, y.end, x.end};
    std::copy(numbers, numbers + 4, windows.mutable_data_ptr<int64_t>() + 4 * n);
    begin.mutable_data_ptr<int64_t>()[n] = total;
    total += (y.end - y.begin) * (x.end - x.begin);
  }
  Tensor pixels = at::empty({total}, masks.options().dtype(threshold ? at::kBool : at::kFloat));
  const Tensor begin_on_device = begin.to(boxes.device());
  launch_paste(masks, boxes, height, width, threshold, integer, begin_on_device.const_data_ptr<int64_t>(), pixels);
  return {windows.to(boxes.device()), pixels};
}

}  // namespace

TORCH_LIBRARY_IMPL(mrcnn_edu, CUDA, m) {
  m.impl("roi_features", roi_features);
  m.impl("roi_features_backward", roi_features_backward);
  m.impl("nms", nms_op);
  m.impl("paste", paste_op);
  m.impl("paste_crops", paste_crops);
}

// Has an op on CUDA met a bad row? For those who would rather wait than learn it from the next call.
TORCH_LIBRARY_FRAGMENT(mrcnn_edu, m) {
  m.def("raise_reported() -> ()", [] {
    C10_CUDA_CHECK(cudaDeviceSynchronize());
    raise_reported();
  });
}

}  // namespace mrcnn_edu::cuda
