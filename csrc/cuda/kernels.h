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

// `order` sorts the rows by score; `usable` says which scores are numbers. overlap is scratch of count * ceil(count / 64)
// words, removed of ceil(count / 64) zeros. Writes the kept rows, best first, and how many there are.
void nms(
    const float* boxes, const bool* usable, const int64_t* order, const int64_t* group, int64_t count,
    double threshold, int64_t max_keep, unsigned long long* overlap, unsigned long long* removed, int64_t* kept,
    int64_t* kept_count, BadRow bad_row, cudaStream_t stream);

// Pixel n of the canvas [masks, height, width] is set within each mask's window; with `begin` [masks] only the windows
// are written, mask n's from pixels + begin[n] on. Exactly one of set and probability is given.
void paste(
    const float* mask, const float* box, int64_t masks, int64_t side, int64_t height, int64_t width, double threshold,
    bool integer, const int64_t* begin, bool* set, float* probability, BadRow bad_row, cudaStream_t stream);

}  // namespace mrcnn_edu::cuda
