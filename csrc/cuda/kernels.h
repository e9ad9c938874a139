// The CUDA kernels as functions of plain pointers, all on one stream. The .cu files include nothing of PyTorch, which
// keeps nvcc quick.
#pragma once

#include <cuda_runtime_api.h>

#include "../roi_problem.h"

namespace mrcnn_edu::cuda {

enum class Number { float32, float64, bfloat16, float16 };  // of the maps; sums are float32, or float64 for float64

// A kernel skips a row that would lead it out of its memory and writes the row's number plus one here. This is host
// memory that the device can write to, so that nobody has to wait for an answer.
using BadRow = int*;

// Layouts as in cpu/kernels.h: channels last throughout.
void roi_mean_forward(const RoiProblem& problem, Number number, void* out, BadRow bad_row, cudaStream_t stream);
void roi_max_forward(
    const RoiProblem& problem, Number number, void* out, int32_t* winners, BadRow bad_row, cudaStream_t stream);

// winners is null for the mean. Atomic additions come in any order, so the last bits of sums vary between runs;
// deterministic asks every cell which bins read it instead, slower and always the same.
void roi_backward(
    const RoiProblem& problem, Number number, const void* gradient, const int32_t* winners, bool deterministic,
    BadRow bad_row, cudaStream_t stream);

// Boxes of several images, one image after the other.
constexpr int kMostImages = 128;  // what fits into the arguments of a kernel
struct NmsImages {
  unsigned count;
  int64_t most_words;               // 64 rows make a word; those of the image with the most rows
  int64_t first[kMostImages + 1];   // row of each image, and the end of the last one
  int64_t overlap[kMostImages];     // each one's place in the table of overlaps, which has rows * words of the image
};

// image[row] is the number of the row's image.
void images_of_rows(const NmsImages& images, int64_t* image, cudaStream_t stream);

// `order` sorts the rows by image and then by score. overlap is scratch, removed scratch of most_words zeros per image.
// From first[n] on `kept` gets the rows that image n keeps, best first, and kept_count[n] how many there are. With
// `gaps` a row whose score is minus infinity is not there, else it is a bad one.
void nms(
    const float* boxes, const double* scores, const int64_t* order, const int64_t* group, const NmsImages& images,
    bool gaps, double threshold, int64_t max_keep, unsigned long long* overlap, unsigned long long* removed,
    int64_t* kept, int64_t* kept_count, BadRow bad_row, cudaStream_t stream);

// map = relu(map + bias + added), channels last; added may be null. `aligned`: all begin at multiples of 16 bytes.
void bias_relu(
    Number number, void* map, const void* bias, const void* added, int64_t cells, int64_t channels, bool aligned,
    cudaStream_t stream);

// Pixel n of the canvas [masks, height, width] is set within each mask's window; with `begin` [masks] only the windows
// are written, mask n's from pixels + begin[n] on. Exactly one of set and probability is given.
void paste(
    const float* mask, const float* box, int64_t masks, int64_t side, int64_t height, int64_t width, double threshold,
    bool integer, const int64_t* begin, bool* set, float* probability, BadRow bad_row, cudaStream_t stream);

}  // namespace mrcnn_edu::cuda
