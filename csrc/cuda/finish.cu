// What is left to do after a convolution, in one pass over its result, on CUDA.
//
// Chapter 20. cuDNN's convolutions give the bare sums; the bias, a shortcut and the ReLU would each be a pass over all
// of them. Maps are channels last, and a thread takes as many neighbouring channels as sixteen bytes hold.
#include "kernels.h"
#include "numbers.cuh"

namespace mrcnn_edu::cuda {
namespace {

template <typename T, typename A, int V>
__global__ void add_and_cut(T* map, const T* bias, const T* added, int64_t packs, int64_t groups) {
  for (int64_t item = first_item(); item < packs; item += item_step()) {
    Pack<T, V> pack = reinterpret_cast<Pack<T, V>*>(map)[item];
    const Pack<T, V> own = reinterpret_cast<const Pack<T, V>*>(bias)[item % groups];
    const Pack<T, V> other = added ? reinterpret_cast<const Pack<T, V>*>(added)[item] : Pack<T, V>::zero();
    for (int v = 0; v < V; ++v) {
      const A sum = to_sum<A>(pack.value[v]) + to_sum<A>(own.value[v]) + to_sum<A>(other.value[v]);
      pack.value[v] = from_sum<T>(sum < A(0) ? A(0) : sum);  // NaN stays NaN
    }
    reinterpret_cast<Pack<T, V>*>(map)[item] = pack;
  }
}

}  // namespace

void bias_relu(
    Number number, void* map, const void* bias, const void* added, int64_t cells, int64_t channels, bool aligned,
    cudaStream_t stream) {
  for_number(number, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    constexpr int kPack = 16 / sizeof(T);
    T* const m = static_cast<T*>(map);
    const T *const b = static_cast<const T*>(bias), *const s = static_cast<const T*>(added);
    if (aligned && channels % kPack == 0) {
      const int64_t packs = cells * (channels / kPack);
      add_and_cut<T, A, kPack><<<Launch(packs).blocks, kThreads, 0, stream>>>(m, b, s, packs, channels / kPack);
    } else {
      const int64_t numbers = cells * channels;
      add_and_cut<T, A, 1><<<Launch(numbers).blocks, kThreads, 0, stream>>>(m, b, s, numbers, channels);
    }
  });
}

}  // namespace mrcnn_edu::cuda
