// The compiled ops on CUDA: check what can be checked without waiting, allocate, launch on the current stream.
//
// Chapter 9. Values of rois lie on the device; reading them would make the host wait in every step. The kernels skip
// rows that would lead them out of their memory and leave a note, which the next call turns into an error.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
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

std::tuple<Tensor, Tensor> nms_of(
    const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups, at::IntArrayRef counts, bool gaps,
    double threshold, std::optional<int64_t> max_keep) {
  check_nms(boxes, scores, groups, threshold, max_keep);
  TORCH_CHECK_VALUE(counts.size() <= kMostImages, "NMS on CUDA takes at most ", kMostImages, " images at once, got ",
                    counts.size());
  NmsImages images{static_cast<unsigned>(counts.size()), 0, {0}, {0}};
  int64_t words_in_all = 0;
  for (size_t n = 0; n < counts.size(); ++n) {
    const int64_t words = (counts[n] + 63) / 64;
    TORCH_CHECK_VALUE(counts[n] >= 0 && words <= 65535, "NMS on CUDA takes 0 to ", 65535 * 64,
                      " boxes per image, got ", counts[n]);
    images.first[n + 1] = images.first[n] + counts[n];
    images.overlap[n] = words_in_all;
    images.most_words = std::max(images.most_words, words);
    words_in_all += counts[n] * words;
  }
  const int64_t rows_in_all = images.first[counts.size()];
  TORCH_CHECK_VALUE(rows_in_all == boxes.size(0), "the images have ", rows_in_all, " boxes together, got ",
                    boxes.size(0));
  const c10::cuda::CUDAGuard guard(boxes.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto indices = boxes.options().dtype(at::kLong);
  Tensor kept = at::zeros({rows_in_all}, indices), kept_counts = at::zeros({int64_t(counts.size())}, indices);
  if (rows_in_all == 0) return {kept, kept_counts};

  const Tensor rows = boxes.contiguous(), score = scores.to(at::kDouble).contiguous();
  Tensor order = std::get<1>(at::sort(score, /*stable=*/true, /*dim=*/0, /*descending=*/true));
  if (counts.size() > 1) {
    Tensor image = at::empty({rows_in_all}, indices);
    images_of_rows(images, image.mutable_data_ptr<int64_t>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const Tensor by_image = std::get<1>(at::sort(image.index_select(0, order), /*stable=*/true, /*dim=*/0, false));
    order = order.index_select(0, by_image);
  }
  order = order.contiguous();
  const Tensor group = groups ? groups->contiguous() : Tensor();
  Tensor overlap = at::empty({words_in_all}, indices);
  Tensor removed = at::zeros({int64_t(counts.size()) * images.most_words}, indices);
  using Word = unsigned long long;
  nms(rows.const_data_ptr<float>(), score.const_data_ptr<double>(), order.const_data_ptr<int64_t>(),
      groups ? group.const_data_ptr<int64_t>() : nullptr, images, gaps, threshold, max_keep.value_or(rows_in_all),
      static_cast<Word*>(overlap.mutable_data_ptr()), static_cast<Word*>(removed.mutable_data_ptr()),
      kept.mutable_data_ptr<int64_t>(), kept_counts.mutable_data_ptr<int64_t>(), bad_row(), stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {kept, kept_counts};
}

Tensor nms_op(
    const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups, double threshold,
    std::optional<int64_t> max_keep) {
  const auto [kept, counts] = nms_of(boxes, scores, groups, {boxes.size(0)}, /*gaps=*/false, threshold, max_keep);
  // The length of the result has to be known, so this one op waits for the device; its own bad rows are known as well.
  const int64_t length = counts.item<int64_t>();
  raise_reported();
  return kept.narrow(0, 0, length).clone();
}

std::tuple<Tensor, Tensor> nms_images(
    const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups, at::IntArrayRef counts,
    double threshold, std::optional<int64_t> max_keep) {
  return nms_of(boxes, scores, groups, counts, /*gaps=*/true, threshold, max_keep);
}

void bias_relu_(Tensor& map, const Tensor& bias, const std::optional<Tensor>& added) {
  TORCH_CHECK_VALUE(map.dim() == 4 && map.is_contiguous(MemoryFormat::ChannelsLast),
                    "the map must be [B, C, H, W] and channels last, got ", map.sizes(), " with ", map.strides());
  TORCH_CHECK_VALUE(bias.dim() == 1 && bias.size(0) == map.size(1) && bias.is_contiguous(), "the bias must be [",
                    map.size(1), "], got ", bias.sizes());
  TORCH_CHECK_VALUE(!added || (added->sizes() == map.sizes() && added->is_contiguous(MemoryFormat::ChannelsLast)),
                    "what is added must be a map of the same size, channels last");
  for (const Tensor* other : {&bias, added ? &*added : &bias}) {
    TORCH_CHECK_VALUE(other->scalar_type() == map.scalar_type() && other->device() == map.device(),
                      "the map, its bias and what is added must have one dtype and device");
  }
  if (map.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(map.device());
  void* const cells = map.mutable_data_ptr();
  const void* const summand = added ? added->const_data_ptr() : nullptr;
  const bool aligned = (reinterpret_cast<uintptr_t>(cells) | reinterpret_cast<uintptr_t>(bias.const_data_ptr()) |
                        reinterpret_cast<uintptr_t>(summand)) % 16 == 0;
  bias_relu(number_of(map.scalar_type()), cells, bias.const_data_ptr(), summand, map.numel() / map.size(1), map.size(1),
            aligned, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
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
  m.impl("nms_images", nms_images);
  m.impl("bias_relu_", bias_relu_);
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
