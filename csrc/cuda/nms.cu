// Greedy non-maximum suppression on CUDA, of many images at once.
//
// Chapter 7 and Chapter 9. First all pairs of an image are compared at once: bit j of row i says that box i would
// suppress the worse box j. Then one block per image walks through its rows, 64 at a time, and never asks the host.
#include "../box_math.h"
#include "kernels.h"

namespace mrcnn_edu::cuda {
namespace {

using Word = unsigned long long;
constexpr int kBits = 64;
constexpr int kScanThreads = 512;

__global__ void images_of_rows(NmsImages images, int64_t* image) {
  for (int64_t i = images.first[blockIdx.x] + threadIdx.x; i < images.first[blockIdx.x + 1]; i += blockDim.x) {
    image[i] = blockIdx.x;
  }
}

// Rows whose score or box is not finite are as good as suppressed from the start; some of them for a good reason.
__global__ void remove_bad_rows(
    const float* boxes, const double* scores, const int64_t* order, NmsImages images, bool gaps, Word* removed,
    BadRow bad_row) {
  const int64_t first = images.first[blockIdx.y], count = images.first[blockIdx.y + 1] - first;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t row = order[first + i];
  bool finite = std::isfinite(scores[row]);
  for (int k = 0; k < 4; ++k) finite = finite && std::isfinite(boxes[4 * row + k]);
  if (finite) return;
  atomicOr(removed + blockIdx.y * images.most_words + i / kBits, Word(1) << (i % kBits));
  if (!gaps || scores[row] != -INFINITY) *bad_row = static_cast<int>(row) + 1;
}

// One block compares 64 rows with 64 columns.
__global__ void compare(
    const float* boxes, const int64_t* order, const int64_t* group, NmsImages images, double threshold, Word* overlap) {
  const int64_t first = images.first[blockIdx.z], count = images.first[blockIdx.z + 1] - first;
  if (blockIdx.x < blockIdx.y || int64_t(blockIdx.x) * kBits >= count) return;  // only worse boxes are suppressed
  order += first;
  overlap += images.overlap[blockIdx.z];
  const int64_t words = (count + kBits - 1) / kBits;
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

// One block for each image. The kept rows are first written as places in the order, from which the block learns, for
// each 64 rows anew, what the rows kept so far suppress: they are asked all at once, one by each thread.
__global__ void scan(
    const int64_t* order, NmsImages images, int64_t max_keep, const Word* overlap, const Word* removed, int64_t* kept,
    int64_t* kept_count) {
  const int64_t first = images.first[blockIdx.x], count = images.first[blockIdx.x + 1] - first;
  const int64_t words = (count + kBits - 1) / kBits;
  order += first, kept += first, overlap += images.overlap[blockIdx.x], removed += blockIdx.x * images.most_words;
  __shared__ Word diagonal[kBits];
  __shared__ Word gone, keep;  // of the current 64 rows
  int64_t total = 0;           // the same in all threads
  for (int64_t w = 0; w < words && total < max_keep; ++w) {
    const int64_t row = w * kBits + threadIdx.x;
    if (threadIdx.x < kBits) diagonal[threadIdx.x] = row < count ? overlap[row * words + w] : 0;
    if (threadIdx.x == 0) gone = removed[w] | (count - w * kBits < kBits ? ~Word(0) << (count - w * kBits) : 0);
    __syncthreads();
    Word found = 0;
    for (int64_t i = threadIdx.x; i < total; i += blockDim.x) found |= overlap[kept[i] * words + w];
    for (int other = 16; other > 0; other /= 2) found |= __shfl_xor_sync(~0u, found, other);
    if (threadIdx.x % 32 == 0 && found != 0) atomicOr(&gone, found);
    __syncthreads();
    if (threadIdx.x == 0) {
      keep = 0;
      for (Word left = ~gone; left != 0;) {
        const int best = __ffsll(static_cast<long long>(left)) - 1;
        keep |= Word(1) << best;
        left &= ~(diagonal[best] | Word(1) << best);
      }
    }
    __syncthreads();
    if (threadIdx.x < kBits && (keep >> threadIdx.x & 1)) {
      const int64_t place = total + __popcll(keep & ((Word(1) << threadIdx.x) - 1));
      if (place < max_keep) kept[place] = row;
    }
    total += __popcll(keep);
    __syncthreads();  // before keep, gone and diagonal are written again, and kept is read
  }
  total = total < max_keep ? total : max_keep;
  for (int64_t i = threadIdx.x; i < total; i += blockDim.x) kept[i] = order[kept[i]];
  if (threadIdx.x == 0) kept_count[blockIdx.x] = total;
}

}  // namespace

void images_of_rows(const NmsImages& images, int64_t* image, cudaStream_t stream) {
  images_of_rows<<<images.count, 256, 0, stream>>>(images, image);
}

void nms(
    const float* boxes, const double* scores, const int64_t* order, const int64_t* group, const NmsImages& images,
    bool gaps, double threshold, int64_t max_keep, unsigned long long* overlap, unsigned long long* removed,
    int64_t* kept, int64_t* kept_count, BadRow bad_row, cudaStream_t stream) {
  const unsigned words = static_cast<unsigned>(images.most_words), number = images.count;
  remove_bad_rows<<<dim3((words * kBits + 255) / 256, number), 256, 0, stream>>>(
      boxes, scores, order, images, gaps, removed, bad_row);
  compare<<<dim3(words, words, number), kBits, 0, stream>>>(boxes, order, group, images, threshold, overlap);
  scan<<<number, kScanThreads, 0, stream>>>(order, images, max_keep, overlap, removed, kept, kept_count);
}

}  // namespace mrcnn_edu::cuda
