// Greedy non-maximum suppression on CUDA.
//
// Chapter 7 and Chapter 9. First all pairs are compared at once: bit j of row i says that box i would suppress the worse
// box j. Then one block walks through the rows, 64 at a time, and never asks the host.
#include "../box_math.h"
#include "kernels.h"

namespace mrcnn_edu::cuda {
namespace {

using Word = unsigned long long;
constexpr int kBits = 64;
constexpr int kScanThreads = 512;

// Rows whose score or box is not finite are as good as suppressed from the start.
__global__ void remove_bad_rows(
    const float* boxes, const bool* usable, const int64_t* order, int64_t count, Word* removed, BadRow bad_row) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float* box = boxes + 4 * order[i];
  bool finite = usable[order[i]];
  for (int k = 0; k < 4; ++k) finite = finite && std::isfinite(box[k]);
  if (finite) return;
  atomicOr(removed + i / kBits, Word(1) << (i % kBits));
  *bad_row = static_cast<int>(order[i]) + 1;
}

// One block compares 64 rows with 64 columns.
__global__ void compare(
    const float* boxes, const int64_t* order, const int64_t* group, int64_t count, double threshold, Word* overlap) {
  const int64_t words = gridDim.x;
  if (blockIdx.x < blockIdx.y) return;  // only worse boxes are suppressed
  __shared__ Box column[kBits];
  __shared__ int64_t column_group[kBits];
  const int64_t j = int64_t(blockIdx.x) * kBits + threadIdx.x;
  if (j < count) {
    column[threadIdx.x] = make_box(boxes + 4 * order[j]);
    column_group[threadIdx.x] = group ? group[order[j]] : 0;
  }
  __syncthreads();
  const int64_t i = int64_t(blockIdx.y) * kBits + threadIdx.x;
  if (i >= count) return;
  const Box box = make_box(boxes + 4 * order[i]);
  const int64_t own_group = group ? group[order[i]] : 0;
  Word bits = 0;
  for (int k = 0; k < kBits; ++k) {
    const int64_t worse = int64_t(blockIdx.x) * kBits + k;
    if (worse > i && worse < count && column_group[k] == own_group && suppresses(box, column[k], threshold)) {
      bits |= Word(1) << k;
    }
  }
  overlap[i * words + blockIdx.x] = bits;
}

// A single block.
__global__ void scan(
    const int64_t* order, int64_t count, int64_t max_keep, const Word* overlap, Word* removed, int64_t* kept,
    int64_t* kept_count) {
  const int64_t words = (count + kBits - 1) / kBits;
  __shared__ Word diagonal[kBits];
  __shared__ Word keep;  // of the current 64 rows
  int64_t total = 0;     // the same in all threads
  for (int64_t w = 0; w < words && total < max_keep; ++w) {
    const int64_t first = w * kBits;
    if (threadIdx.x < kBits) {
      diagonal[threadIdx.x] = first + threadIdx.x < count ? overlap[(first + threadIdx.x) * words + w] : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Word gone = removed[w];
      keep = 0;
      for (int k = 0; k < kBits && first + k < count; ++k) {
        if (gone >> k & 1) continue;
        keep |= Word(1) << k;
        gone |= diagonal[k];
      }
    }
    __syncthreads();
    if (threadIdx.x < kBits && (keep >> threadIdx.x & 1)) {
      const int64_t place = total + __popcll(keep & ((Word(1) << threadIdx.x) - 1));
      if (place < max_keep) kept[place] = order[first + threadIdx.x];
    }
    for (int64_t later = w + 1 + threadIdx.x; later < words; later += blockDim.x) {
      Word gone = removed[later];
      for (Word rest = keep; rest != 0; rest &= rest - 1) {
        gone |= overlap[(first + __ffsll(static_cast<long long>(rest)) - 1) * words + later];
      }
      removed[later] = gone;
    }
    total += __popcll(keep);
    __syncthreads();  // before keep and diagonal are written again, and removed is read
  }
  if (threadIdx.x == 0) *kept_count = total < max_keep ? total : max_keep;
}

}  // namespace

void nms(
    const float* boxes, const bool* usable, const int64_t* order, const int64_t* group, int64_t count,
    double threshold, int64_t max_keep, unsigned long long* overlap, unsigned long long* removed, int64_t* kept,
    int64_t* kept_count, BadRow bad_row, cudaStream_t stream) {
  const unsigned words = static_cast<unsigned>((count + kBits - 1) / kBits);
  const unsigned blocks = static_cast<unsigned>((count + 255) / 256);
  remove_bad_rows<<<blocks, 256, 0, stream>>>(boxes, usable, order, count, removed, bad_row);
  compare<<<dim3(words, words), kBits, 0, stream>>>(boxes, order, group, count, threshold, overlap);
  scan<<<1, kScanThreads, 0, stream>>>(order, count, max_keep, overlap, removed, kept, kept_count);
}

}  // namespace mrcnn_edu::cuda
