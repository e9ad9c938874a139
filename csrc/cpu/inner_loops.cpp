// The loops over neighbouring channels, written plainly: the compiler turns them into vector instructions.
//
// Chapter 9. No sum is ever reordered or fused (-ffp-contract=off), so every processor gives the same bits.
#include "inner_loops.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace mrcnn_edu {
namespace {

// N rows in one pass over the channels, their pointers and weights in registers.
template <int N, bool add, typename T, typename A>
MRCNN_INLINE void pass(const T* const* row, const A* weight, int64_t channels, A* __restrict sum) {
  const T* r[N];
  A w[N];
  for (int k = 0; k < N; ++k) r[k] = row[k], w[k] = weight[k];
  for (int64_t c = 0; c < channels; ++c) {
    A value = w[0] * A(r[0][c]);
    for (int k = 1; k < N; ++k) value += w[k] * A(r[k][c]);
    sum[c] = add ? sum[c] + value : value;
  }
}

template <bool add, typename T, typename A>
MRCNN_INLINE void pass_of(int64_t rows, const T* const* row, const A* weight, int64_t channels, A* sum) {
  switch (rows) {
    case 1: return pass<1, add>(row, weight, channels, sum);
    case 2: return pass<2, add>(row, weight, channels, sum);
    case 3: return pass<3, add>(row, weight, channels, sum);
    default: return pass<4, add>(row, weight, channels, sum);
  }
}

template <bool add, typename T, typename A>
MRCNN_INLINE void sum_rows_loop(const T* const* row, const A* weight, int64_t rows, int64_t channels, A* sum) {
  constexpr int64_t kMost = 4;
  if (rows == 0) {
    for (int64_t c = 0; !add && c < channels; ++c) sum[c] = A(0);
    return;
  }
  pass_of<add>(rows, row, weight, channels, sum);
  for (int64_t k = kMost; k < rows; k += kMost) pass_of<true>(rows - k, row + k, weight + k, channels, sum);
}

template <typename T, typename A>
MRCNN_INLINE void max_sample_loop(
    const T* const* row, const A* weight, bool whole_cell, int32_t sample, int64_t channels, A* best, int32_t* winner) {
  const T *r0 = row[0], *r1 = row[1], *r2 = row[2], *r3 = row[3];
  const A w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
  for (int64_t c = 0; c < channels; ++c) {
    const A value =
        whole_cell ? A(r0[c]) : (w0 * A(r0[c]) + w1 * A(r1[c])) + (w2 * A(r2[c]) + w3 * A(r3[c]));
    const bool better = sample == 0 || value > best[c] || (value != value && best[c] == best[c]);
    best[c] = better ? value : best[c];
    winner[c] = better ? sample : winner[c];
  }
}

}  // namespace

#define MRCNN_FOR_MAPS(T, A)                                                                                         \
  template <>                                                                                                        \
  MRCNN_EVERY_CPU void sum_rows(const T* const* row, const A* weight, int64_t rows, int64_t channels, A* sum) {      \
    sum_rows_loop<false>(row, weight, rows, channels, sum);                                                          \
  }                                                                                                                  \
  template <>                                                                                                        \
  MRCNN_EVERY_CPU void max_sample(                                                                                   \
      const T* const* row, const A* weight, bool whole_cell, int32_t sample, int64_t channels, A* best,              \
      int32_t* winner) {                                                                                             \
    max_sample_loop(row, weight, whole_cell, sample, channels, best, winner);                                        \
  }
MRCNN_FOR_MAPS(float, float)
MRCNN_FOR_MAPS(double, double)
MRCNN_FOR_MAPS(c10::BFloat16, float)
MRCNN_FOR_MAPS(c10::Half, float)

#define MRCNN_FOR_SUMS(A)                                                                                        \
  template <>                                                                                                    \
  MRCNN_EVERY_CPU void add_rows(const A* const* row, const A* weight, int64_t rows, int64_t channels, A* sum) { \
    sum_rows_loop<true>(row, weight, rows, channels, sum);                                                       \
  }
MRCNN_FOR_SUMS(float)
MRCNN_FOR_SUMS(double)

}  // namespace mrcnn_edu
