// The compiled ops on the CPU: check, allocate, call the kernel.
//
// Chapter 9.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/util/safe_numerics.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../checks.h"
#include "kernels.h"
#include "transpose.h"

namespace mrcnn_edu {
namespace {

using at::MemoryFormat;
using at::Tensor;

// Calls work(T, A) with the type of the maps and the type of sums.
template <typename Work>
void for_type(at::ScalarType type, const Work& work) {
  switch (type) {
    case at::kFloat: return work(float{}, float{});
    case at::kDouble: return work(double{}, double{});
    case at::kBFloat16: return work(c10::BFloat16{}, float{});
    case at::kHalf: return work(c10::Half{}, float{});
    default: TORCH_CHECK_TYPE(false, "feature maps must be floating point, got ", type);
  }
}

void check_rows(const RoiProblem& problem) {
  for (int64_t r = 0; r < problem.rois; ++r) {
    const float* roi = problem.roi + 5 * r;
    TORCH_CHECK_VALUE(problem.is_valid(r), "rois[", r, "] = (", roi[0], ", ", roi[1], ", ", roi[2], ", ", roi[3],
                      ", ", roi[4], ") on level ", problem.level[r], " must be finite numbers (image, x1, y1, x2, y2) ",
                      "with a whole image index (there are ", problem.images, " images) and a level in 0..",
                      problem.levels - 1);
  }
}

template <typename Bits>  // what the numbers are does not matter here, only how large
void transpose_as(const Tensor& from, int64_t rows, int64_t columns, Tensor& to) {
  transpose_all(static_cast<const Bits*>(from.const_data_ptr()), from.size(0), rows, columns,
                static_cast<Bits*>(to.mutable_data_ptr()));
}

// A tensor [N, C, H, W] in the given memory format.
Tensor turned(const Tensor& tensor, MemoryFormat format) {
  if (tensor.is_contiguous(format)) return tensor;
  Tensor result = at::empty(tensor.sizes(), tensor.options(), format);
  int64_t rows = tensor.size(1), columns = tensor.size(2) * tensor.size(3);
  const bool to_planes = format == MemoryFormat::Contiguous;
  if (to_planes) std::swap(rows, columns);
  if (!tensor.is_contiguous(to_planes ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous)) result.copy_(tensor);
  else if (tensor.element_size() == 2) transpose_as<uint16_t>(tensor, rows, columns, result);
  else if (tensor.element_size() == 4) transpose_as<uint32_t>(tensor, rows, columns, result);
  else if (tensor.element_size() == 8) transpose_as<uint64_t>(tensor, rows, columns, result);
  else result.copy_(tensor);  // of no type that the ops take, which is said later
  return result;
}

// Turning whole maps to channels last reads them in order; turning only the window of each RoI jumps about, which costs
// some three times as much per cell.
bool worth_turning(const at::TensorList features, const RoiProblem& problem) {
  const auto cells_of = [](const Axis<float>& axis) {
    return std::fmin(std::fabs(axis.bin_size) * float(axis.bins) + 2, float(axis.cells));
  };
  double in_windows = 0, in_maps = 0;
  for (int64_t r = 0; r < problem.rois; ++r) {
    in_windows += cells_of(problem.axis_y<float>(r)) * cells_of(problem.axis_x<float>(r));
  }
  for (const Tensor& map : features) in_maps += map.size(0) * map.size(2) * map.size(3);
  return in_windows * 3 > in_maps;
}

// Linux hands out new memory in pages of 4 KB as it is written, which takes as long as computing what is written; pages
// of 2 MB it gives to those who ask. For much more memory than this it would first have to make room for such pages.
void advise_large_pages(Tensor& result) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 1 << 21, kMost = 64 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, end = (begin + result.nbytes()) / kPage * kPage;
  if (first < end && end - first <= kMost) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

std::tuple<Tensor, Tensor> roi_features(
    at::TensorList features, const Tensor& rois_, const Tensor& levels_, at::ArrayRef<double> scales, int64_t layer,
    int64_t bins_y, int64_t bins_x, int64_t samples_per_bin, bool aligned, bool maximum) {
  const Tensor rois = rois_.contiguous(), levels = levels_.contiguous();
  RoiProblem problem =
      describe(features, rois, levels, scales, {layer, bins_y, bins_x, samples_per_bin, aligned, maximum});
  check_rows(problem);

  const MemoryFormat wanted = all_channels_last(features) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const bool few_channels = !maximum && problem.channels <= kFewChannels;
  const bool planes =
      few_channels || (!maximum && wanted == MemoryFormat::Contiguous && !worth_turning(features, problem));
  std::vector<Tensor> maps;
  for (const Tensor& map : features) {
    maps.push_back(turned(map, planes ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast));
    problem.maps[maps.size() - 1].cells = const_cast<void*>(maps.back().const_data_ptr());
  }

  const MemoryFormat made = maximum ? MemoryFormat::ChannelsLast : few_channels ? MemoryFormat::Contiguous : wanted;
  Tensor out = at::empty({problem.rois, problem.channels, bins_y, bins_x}, features[0].options(), made);
  advise_large_pages(out);
  Tensor winners = at::empty({maximum ? out.numel() : 0}, rois.options().dtype(at::kInt));
  for_type(features[0].scalar_type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    T* pooled = out.mutable_data_ptr<T>();
    if (maximum) {
      roi_max_forward<T, A>(problem, pooled, winners.mutable_data_ptr<int32_t>());
    } else if (few_channels) {
      roi_mean_forward_few_channels<T, A>(problem, pooled);
    } else {
      roi_mean_forward<T, A>(problem, planes, made == MemoryFormat::Contiguous, pooled);
    }
  });
  return {turned(out, wanted), winners};
}

std::vector<Tensor> roi_features_backward(
    const Tensor& gradient, const Tensor& winners, const Tensor& rois_, const Tensor& levels_,
    at::ArrayRef<double> scales, int64_t images, at::IntArrayRef heights, at::IntArrayRef widths, bool channels_last,
    int64_t layer, int64_t samples_per_bin, bool aligned, bool maximum) {
  TORCH_CHECK_VALUE(gradient.dim() == 4, "the gradient must be [R, C, P, P], got ", gradient.sizes());
  const Tensor rois = rois_.contiguous(), levels = levels_.contiguous();
  RoiProblem problem =
      describe(rois, levels, scales, images, gradient.size(1), heights, widths,
               {layer, gradient.size(2), gradient.size(3), samples_per_bin, aligned, maximum});
  check_gradient(gradient, winners, problem);
  check_rows(problem);

  const auto type = gradient.scalar_type();
  const auto exact = type == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<Tensor> result;
  for (size_t i = 0; i < heights.size(); ++i) {
    // at::zeros would ignore the memory format
    result.push_back(at::empty({images, problem.channels, heights[i], widths[i]}, gradient.options().dtype(exact),
                               MemoryFormat::ChannelsLast).zero_());
    problem.maps[i].cells = result.back().mutable_data_ptr();
  }
  const Tensor bins = turned(gradient, MemoryFormat::ChannelsLast);
  for_type(type, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const T* g = bins.const_data_ptr<T>();
    if (maximum) {
      roi_max_backward<T, A>(problem, g, winners.const_data_ptr<int32_t>());
    } else {
      roi_mean_backward<T, A>(problem, g);
    }
  });
  if (type != exact || !channels_last) {
    const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
    for (Tensor& map : result) map = turned(map.to(type), format);
  }
  return result;
}

Tensor nms_op(
    const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups, double threshold,
    std::optional<int64_t> max_keep) {
  check_nms(boxes, scores, groups, threshold, max_keep);
  const Tensor rows = boxes.contiguous(), values = scores.to(at::kDouble).contiguous();
  check_finite("boxes", rows);
  check_finite("scores", values);
  const Tensor group = groups ? groups->contiguous() : Tensor();
  const std::vector<int64_t> kept =
      nms(rows.const_data_ptr<float>(), values.const_data_ptr<double>(),
          groups ? group.const_data_ptr<int64_t>() : nullptr, rows.size(0), threshold,
          max_keep.value_or(std::numeric_limits<int64_t>::max()));
  Tensor result = at::empty({static_cast<int64_t>(kept.size())}, boxes.options().dtype(at::kLong));
  std::copy(kept.begin(), kept.end(), result.mutable_data_ptr<int64_t>());
  return result;
}

// Memory new from the system is zero already, and calloc knows it: pixels that no mask covers are not even touched.
Tensor zeros_untouched(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr size_t kAligned = 64;
  uint64_t bytes = options.dtype().itemsize();
  bool too_large = false;
  for (const int64_t size : sizes) too_large |= c10::mul_overflows(bytes, uint64_t(size), &bytes);
  void* memory = too_large || bytes > (uint64_t(1) << 62) ? nullptr : std::calloc(bytes + kAligned, 1);
  TORCH_CHECK(memory != nullptr, "not enough memory for ", sizes, " pixels");
  const auto first = (reinterpret_cast<uintptr_t>(memory) + kAligned - 1) / kAligned * kAligned;
  return at::from_blob(reinterpret_cast<void*>(first), sizes, [memory](void*) { std::free(memory); }, options);
}

Tensor with_ring_of_zeros(const Tensor& masks, bool integer) {
  if (!integer) return masks.contiguous();
  const int64_t side = masks.size(1);
  Tensor padded = at::zeros({masks.size(0), side + 2, side + 2}, masks.options());
  padded.narrow(1, 1, side).narrow(2, 1, side).copy_(masks);
  return padded;
}

template <typename Pixel>
Tensor paste_into(
    const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, double threshold, bool integer,
    at::ScalarType type) {
  const int64_t side = masks.size(1);
  Tensor canvas = zeros_untouched({masks.size(0), height, width}, masks.options().dtype(type));
  Pixel* pixels = canvas.mutable_data_ptr<Pixel>();
  const float *mask = masks.const_data_ptr<float>(), *box = boxes.const_data_ptr<float>();
  at::parallel_for(0, masks.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Window window = paste_window(box + 4 * n, side, height, width, integer);
      paste_mask(mask + n * side * side, box + 4 * n, side, window, threshold, integer,
                 pixels + (n * height + window.top) * width + window.left, width);
    }
  });
  return canvas;
}

Tensor paste(
    const Tensor& masks_, const Tensor& boxes_, int64_t height, int64_t width, std::optional<double> threshold,
    bool integer) {
  check_paste(masks_, boxes_, height, width);
  const Tensor masks = with_ring_of_zeros(masks_, integer), boxes = boxes_.contiguous();
  check_finite("boxes", boxes);
  if (threshold) return paste_into<bool>(masks, boxes, height, width, *threshold, integer, at::kBool);
  return paste_into<float>(masks, boxes, height, width, 0, integer, at::kFloat);
}

std::tuple<Tensor, Tensor> paste_crops(
    const Tensor& masks_, const Tensor& boxes_, int64_t height, int64_t width, std::optional<double> threshold,
    bool integer) {
  check_paste(masks_, boxes_, height, width);
  const Tensor masks = with_ring_of_zeros(masks_, integer), boxes = boxes_.contiguous();
  check_finite("boxes", boxes);
  const int64_t count = masks.size(0), side = masks.size(1);
  Tensor windows = at::empty({count, 4}, boxes.options().dtype(at::kLong));
  int64_t* row = windows.mutable_data_ptr<int64_t>();
  const float *mask = masks.const_data_ptr<float>(), *box = boxes.const_data_ptr<float>();
  std::vector<Window> window(count);
  std::vector<int64_t> begin(count + 1, 0);
  for (int64_t n = 0; n < count; ++n) {
    const Window& w = window[n] = paste_window(box + 4 * n, side, height, width, integer);
    begin[n + 1] = begin[n] + (w.bottom - w.top) * (w.right - w.left);
    const int64_t numbers[4] = {w.top, w.left, w.bottom, w.right};
    std::copy(numbers, numbers + 4, row + 4 * n);
  }
  Tensor pixels = at::empty({begin[count]}, masks.options().dtype(threshold ? at::kBool : at::kFloat));
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t width_of_window = window[n].right - window[n].left;
      const auto put = [&](auto* pixel) {
        paste_mask(mask + n * side * side, box + 4 * n, side, window[n], threshold.value_or(0), integer,
                   pixel + begin[n], width_of_window);
      };
      if (threshold) put(pixels.mutable_data_ptr<bool>());
      else put(pixels.mutable_data_ptr<float>());
    }
  });
  return {windows, pixels};
}

}  // namespace

TORCH_LIBRARY_IMPL(mrcnn_edu, CPU, m) {
  m.impl("roi_features", roi_features);
  m.impl("roi_features_backward", roi_features_backward);
  m.impl("nms", nms_op);
  m.impl("paste", paste);
  m.impl("paste_crops", paste_crops);
}

}  // namespace mrcnn_edu
