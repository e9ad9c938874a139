// The loops over neighbouring channels in which nearly all of the time goes, compiled for several processors.
//
// Chapter 9. T is the type of the maps, A the type sums are kept in: float, or double for double.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// Compile a function several times and let the loader choose what this processor understands best. Only GCC on Linux
// does that; elsewhere the function is compiled once.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && !defined(MRCNN_ONE_VERSION)
#define MRCNN_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#define MRCNN_INLINE inline __attribute__((always_inline))
#else
#define MRCNN_EVERY_CPU
#define MRCNN_INLINE inline
#endif

namespace mrcnn_edu {

// sum[c] = weight[0] * row[0][c] + weight[1] * row[1][c] + ..., or that added to sum[c].
template <typename T, typename A>
void sum_rows(const T* const* row, const A* weight, int64_t rows, int64_t channels, A* sum);
template <typename A>
void add_rows(const A* const* row, const A* weight, int64_t rows, int64_t channels, A* sum);

// best[c] = max(best[c], the sample), and which sample it was. The first of equal ones stays; NaN beats every number.
// A whole cell is row[0] as it is: a neighbour with weight 0 must not spoil it by 0 * inf.
template <typename T, typename A>
void max_sample(
    const T* const* row, const A* weight, bool whole_cell, int32_t sample, int64_t channels, A* best, int32_t* winner);

// A result larger than the caches only clears them of the map, and what is overwritten need not be read before: these
// stores go straight to memory. End with finish_stores().
inline void store_past_caches(void* to, const void* from, size_t bytes) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
    auto* target = static_cast<__m128i*>(to);
    auto* source = static_cast<const __m128i*>(from);
    for (size_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(target + i, _mm_loadu_si128(source + i));
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace mrcnn_edu
