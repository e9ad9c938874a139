// What the RoI kernels share: half precision in and out of sums, and which thread does what.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace mrcnn_edu::cuda {

// Calls work(T, A) with the type of the maps and the type of sums.
template <typename Work>
void for_number(Number number, const Work& work) {
  switch (number) {
    case Number::float32: return work(float{}, float{});
    case Number::float64: return work(double{}, double{});
    case Number::bfloat16: return work(__nv_bfloat16{}, float{});
    case Number::float16: return work(__half{}, float{});
  }
}

template <typename A, typename T>
__device__ __forceinline__ A to_sum(T value) { return static_cast<A>(value); }
template <>
__device__ __forceinline__ float to_sum<float>(__nv_bfloat16 value) { return __bfloat162float(value); }
template <>
__device__ __forceinline__ float to_sum<float>(__half value) { return __half2float(value); }

template <typename T, typename A>
__device__ __forceinline__ T from_sum(A sum) { return static_cast<T>(sum); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_sum<__nv_bfloat16>(float sum) { return __float2bfloat16_rn(sum); }
template <>
__device__ __forceinline__ __half from_sum<__half>(float sum) { return __float2half_rn(sum); }

// Neighbouring channels that one thread reads and writes together.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];

  static __device__ __forceinline__ Pack zero() {
    Pack pack;
    for (int v = 0; v < V; ++v) pack.value[v] = from_sum<T>(0.0f);
    return pack;
  }
};

// sum[v] += weight * cell[v]
template <typename T, typename A, int V>
__device__ __forceinline__ void add(A (&sum)[V], A weight, const T* cell) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(cell);
  for (int v = 0; v < V; ++v) sum[v] += weight * to_sum<A>(pack.value[v]);
}

// The cells that a bin of one or two samples reads along one axis, each once: where the samples share a cell, its
// weights are added. A weight of 0 is no cell.
template <typename A>
struct Reads {
  int cell[4];
  A weight[4];

  __device__ __forceinline__ Reads(const Samples<A>& samples, int cells) : cell{}, weight{} {
    const Taps<A> first = taps_at(samples.position(0), cells);
    cell[0] = first.low, weight[0] = first.low_weight;
    cell[1] = first.high, weight[1] = first.high_weight;
    if (samples.count < 2) return;
    const Taps<A> second = taps_at(samples.position(1), cells);
    add(2, second.low, second.low_weight);
    add(3, second.high, second.high_weight);
  }

  __device__ __forceinline__ void add(int place, int other, A part) {
    if (other == cell[0] && weight[0] != A(0)) weight[0] += part;
    else if (other == cell[1] && weight[1] != A(0)) weight[1] += part;
    else cell[place] = other, weight[place] = part;
  }
};

// Are there so few samples in all bins of the RoI? So it is but for adaptive sampling and for whole cells.
template <typename A>
__device__ __forceinline__ bool few_samples(const Axis<A>& y, const Axis<A>& x) {
  return y.layer != Layer::roi_pool && y.samples >= 1 && y.samples <= 2 && x.samples >= 1 && x.samples <= 2;
}

constexpr int kThreads = 256;  // per block
constexpr int64_t kThreadsAtOnce = 1 << 17;  // about what a large GPU has room for

// Enough blocks for so many items; very many items are taken in several rounds.
struct Launch {
  unsigned blocks;
  explicit Launch(int64_t items) {
    const int64_t wanted = (items + kThreads - 1) / kThreads;
    blocks = static_cast<unsigned>(wanted < 1 ? 1 : wanted > (1 << 30) ? (1 << 30) : wanted);
  }
};
__device__ __forceinline__ int64_t first_item() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t item_step() { return int64_t(gridDim.x) * blockDim.x; }

// Item number -> RoI, row of bins, part of the row and group of channels; channels run fastest.
struct Place {
  int64_t roi, channel;
  int by, part;
};
__device__ __forceinline__ Place locate(const RoiProblem& problem, int64_t item, int64_t groups, int parts = 1) {
  if (problem.rois * problem.bins_y * parts * groups < (int64_t(1) << 31)) {  // 32 bits divide several times as fast
    const uint32_t small = static_cast<uint32_t>(item), bin = small / static_cast<uint32_t>(groups);
    const uint32_t line = bin / parts, bins = static_cast<uint32_t>(problem.bins_y);
    return {line / bins, small % static_cast<uint32_t>(groups), static_cast<int>(line % bins),
            static_cast<int>(bin % parts)};
  }
  const int64_t bin = item / groups, line = bin / parts;
  return {line / problem.bins_y, item % groups, static_cast<int>(line % problem.bins_y), static_cast<int>(bin % parts)};
}

}  // namespace mrcnn_edu::cuda
