// From planes to channels last and back: both are the transposition of matrices, one per image or RoI.
//
// Chapter 9.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace mrcnn_edu {

constexpr int64_t kStrip = 64;  // columns of a matrix that are turned together

// [rows, columns] -> [columns, rows], of the columns first to last. Four rows are read side by side, so that four
// neighbours are written at once.
template <typename T>
void transpose(const T* from, int64_t rows, int64_t columns, int64_t first, int64_t last, T* to) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    for (int64_t c = first; c < last; ++c) {
      const T* top = from + r * columns + c;
      const T four[4] = {top[0], top[columns], top[2 * columns], top[3 * columns]};
      std::copy(four, four + 4, to + c * rows + r);
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = first; c < last; ++c) to[c * rows + r] = from[r * columns + c];
  }
}

// The same for many matrices, one after the other.
template <typename T>
void transpose_all(const T* from, int64_t matrices, int64_t rows, int64_t columns, T* to) {
  const int64_t strips = (columns + kStrip - 1) / kStrip;
  at::parallel_for(0, matrices * strips, 1 + (1 << 15) / (rows * kStrip + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = i / strips * rows * columns, first = i % strips * kStrip;
      transpose(from + offset, rows, columns, first, std::min(first + kStrip, columns), to + offset);
    }
  });
}

}  // namespace mrcnn_edu
