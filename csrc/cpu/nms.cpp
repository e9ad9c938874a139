// Greedy non-maximum suppression on the CPU.
//
// Chapter 7 and Chapter 9. A candidate is compared with the boxes kept so far, thirty-two at a time and without dividing;
// only where one of them may overlap enough is the IoU itself worked out, exactly as the definition has it.
#include <algorithm>
#include <cfloat>
#include <limits>
#include <unordered_map>

#include "../box_math.h"
#include "inner_loops.h"
#include "kernels.h"

namespace mrcnn_edu {
namespace {

constexpr int64_t kBlock = 32;

// The kept boxes of one group, coordinate by coordinate, padded to whole blocks with boxes that meet nothing.
struct Kept {
  std::vector<float> x1, y1, x2, y2, area;
  int64_t count = 0;

  void add(const Box& box) {
    if (count % kBlock == 0) {
      for (auto* edge : {&x1, &y1}) edge->resize(count + kBlock, FLT_MAX);
      for (auto* edge : {&x2, &y2}) edge->resize(count + kBlock, -FLT_MAX);
      area.resize(count + kBlock, 0.0f);
    }
    x1[count] = box.x1, y1[count] = box.y1, x2[count] = box.x2, y2[count] = box.y2, area[count] = box.area;
    ++count;
  }

  Box at(int64_t k) const { return {x1[k], y1[k], x2[k], y2[k], area[k]}; }
};

// The first block from k on in which a box may suppress this one, or count. It may say so too often (by rounding), but
// never too rarely.
MRCNN_EVERY_CPU int64_t next_suspect(
    const float* x1, const float* y1, const float* x2, const float* y2, const float* area, int64_t k, int64_t count,
    Box box, float low) {
  for (; k < count; k += kBlock) {
    int any = 0;
    for (int64_t i = k; i < k + kBlock; ++i) {
      const float right = x2[i] < box.x2 ? x2[i] : box.x2, left = x1[i] > box.x1 ? x1[i] : box.x1;
      const float bottom = y2[i] < box.y2 ? y2[i] : box.y2, top = y1[i] > box.y1 ? y1[i] : box.y1;
      const float width = right - left > 0 ? right - left : 0;
      const float height = bottom - top > 0 ? bottom - top : 0;
      const float shared = width * height;
      const float together = area[i] + box.area - shared;
      any |= (shared > low * together) | !(together <= FLT_MAX);
    }
    if (any != 0) return k;
  }
  return count;
}

bool is_suppressed(const Kept& kept, const Box& box, double threshold) {
  const float low = static_cast<float>(threshold * (1 - 1e-5));
  const auto suspect = [&](int64_t k) {
    return next_suspect(kept.x1.data(), kept.y1.data(), kept.x2.data(), kept.y2.data(), kept.area.data(), k,
                        kept.count, box, low);
  };
  for (int64_t k = suspect(0); k < kept.count; k = suspect(k + kBlock)) {
    for (int64_t i = k; i < std::min(k + kBlock, kept.count); ++i) {
      if (suppresses(kept.at(i), box, threshold)) return true;
    }
  }
  return false;
}

}  // namespace

std::vector<int64_t> nms(
    const float* boxes, const int64_t* order, const int64_t* group, int64_t count, double threshold, int64_t max_keep) {
  std::vector<int64_t> result;
  std::unordered_map<int64_t, Kept> kept;  // by group
  for (int64_t n = 0; n < count && static_cast<int64_t>(result.size()) < max_keep; ++n) {
    const int64_t i = order[n];
    const Box box = make_box(boxes + 4 * i);
    Kept& rivals = kept[group ? group[i] : 0];
    if (is_suppressed(rivals, box, threshold)) continue;
    rivals.add(box);
    result.push_back(i);
  }
  return result;
}

}  // namespace mrcnn_edu
