// From planes to channels last and back: both are the transposition of matrices, one per image or RoI.
//
// Chapter 9.
#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels.h"

namespace mrcnn_edu {

template <typename T>
void transpose(const T* from, int64_t rows, int64_t columns, int64_t first, int64_t last, T* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = first; c < last; ++c) to[c * rows + r] = from[r * columns + c];
  }
}

template <typename T>
void transpose_all(const T* from, int64_t matrices, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t kLine = 64 / sizeof(T);  // numbers in a cache line; so many are taken from a row at a time
  const int64_t lines = (columns + kLine - 1) / kLine;
  at::parallel_for(0, matrices * lines, 1 + (1 << 15) / (rows * kLine + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = i / lines * rows * columns, first = i % lines * kLine;
      transpose(from + offset, rows, columns, first, std::min(first + kLine, columns), to + offset);
    }
  });
}

template void transpose_all<uint16_t>(const uint16_t*, int64_t, int64_t, int64_t, uint16_t*);
template void transpose_all<uint32_t>(const uint32_t*, int64_t, int64_t, int64_t, uint32_t*);
template void transpose_all<uint64_t>(const uint64_t*, int64_t, int64_t, int64_t, uint64_t*);

}  // namespace mrcnn_edu
