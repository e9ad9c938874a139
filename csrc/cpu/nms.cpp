// Greedy non-maximum suppression on the CPU.
//
// Chapter 7 and Chapter 9. A candidate is compared with the boxes kept so far, thirty-two at a time and without dividing;
// only where one of them may overlap enough is the IoU itself worked out, exactly as the definition has it.
#include <algorithm>
#include <cfloat>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "../box_math.h"
#include "inner_loops.h"
#include "kernels.h"

namespace mrcnn_edu {
namespace {

// A number that is smaller the larger the score is: the bits of a double are in order but for those of negative ones.
uint64_t rank_of(double score) {
  const double value = score + 0.0;  // -0 is 0
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint64_t sign = uint64_t(1) << 63;
  return bits & sign ? bits : ~(bits | sign);
}

// The rows from the largest score to the smallest, equal ones in their order: a radix sort, eight bits a turn.
std::vector<int64_t> best_first(const double* scores, int64_t count) {
  struct Entry {
    uint64_t rank;
    int64_t row;
  };
  std::vector<Entry> entries(count), sorted(count);
  for (int64_t i = 0; i < count; ++i) entries[i] = {rank_of(scores[i]), i};
  for (int shift = 0; shift < 64; shift += 8) {
    int64_t place[256] = {};
    for (const Entry& entry : entries) ++place[entry.rank >> shift & 255];
    if (std::find(place, place + 256, count) != place + 256) continue;  // all alike, as the last bits of a float32
    int64_t next = 0;
    for (int64_t& p : place) next += std::exchange(p, next);
    for (const Entry& entry : entries) sorted[place[entry.rank >> shift & 255]++] = entry;
    entries.swap(sorted);
  }
  std::vector<int64_t> order(count);
  for (int64_t i = 0; i < count; ++i) order[i] = entries[i].row;
  return order;
}

constexpr int kBlock = 32;

// So many kept boxes, coordinate by coordinate. Places not taken yet hold boxes that meet nothing.
struct Block {
  float x1[kBlock], y1[kBlock], x2[kBlock], y2[kBlock], area[kBlock];

  Block() {
    std::fill(x1, x1 + kBlock, FLT_MAX), std::fill(y1, y1 + kBlock, FLT_MAX);
    std::fill(x2, x2 + kBlock, -FLT_MAX), std::fill(y2, y2 + kBlock, -FLT_MAX);
    std::fill(area, area + kBlock, 0.0f);
  }

  void set(int i, const Box& box) { x1[i] = box.x1, y1[i] = box.y1, x2[i] = box.x2, y2[i] = box.y2, area[i] = box.area; }
  Box at(int i) const { return {x1[i], y1[i], x2[i], y2[i], area[i]}; }
};

// The first block from `begin` on in which a box may suppress this one, or `end`. It may say so too often (by rounding),
// but never too rarely.
MRCNN_EVERY_CPU const Block* next_suspect(const Block* begin, const Block* end, Box box, float low) {
  for (; begin != end; ++begin) {
    int any = 0;
    for (int i = 0; i < kBlock; ++i) {
      const float right = begin->x2[i] < box.x2 ? begin->x2[i] : box.x2;
      const float left = begin->x1[i] > box.x1 ? begin->x1[i] : box.x1;
      const float bottom = begin->y2[i] < box.y2 ? begin->y2[i] : box.y2;
      const float top = begin->y1[i] > box.y1 ? begin->y1[i] : box.y1;
      const float width = right - left > 0 ? right - left : 0;
      const float height = bottom - top > 0 ? bottom - top : 0;
      const float shared = width * height;
      const float together = begin->area[i] + box.area - shared;
      any |= (shared > low * together) | !(together <= FLT_MAX);
    }
    if (any != 0) break;
  }
  return begin;
}

// The kept boxes of one group.
struct Kept {
  std::vector<Block> blocks;
  int64_t count = 0;

  void add(const Box& box) {
    if (count % kBlock == 0) blocks.emplace_back();
    blocks.back().set(static_cast<int>(count++ % kBlock), box);
  }

  bool suppress(const Box& box, double threshold) const {
    const float low = static_cast<float>(threshold * (1 - 1e-5));
    const Block* const end = blocks.data() + blocks.size();
    for (const Block* block = blocks.data(); (block = next_suspect(block, end, box, low)) != end; ++block) {
      for (int i = 0; i < kBlock; ++i) {
        if (suppresses(block->at(i), box, threshold)) return true;
      }
    }
    return false;
  }
};

}  // namespace

std::vector<int64_t> nms(
    const float* boxes, const double* scores, const int64_t* group, int64_t count, double threshold, int64_t max_keep) {
  std::vector<int64_t> result;
  std::unordered_map<int64_t, Kept> kept;  // by group
  for (const int64_t i : best_first(scores, count)) {
    if (static_cast<int64_t>(result.size()) >= max_keep) break;
    const Box box = make_box(boxes + 4 * i);
    Kept& rivals = kept[group ? group[i] : 0];
    if (rivals.suppress(box, threshold)) continue;
    rivals.add(box);
    result.push_back(i);
  }
  return result;
}

}  // namespace mrcnn_edu
