// What one axis contributes, worked out once per RoI instead of once per bin of the other axis.
#pragma once

#include <algorithm>
#include <vector>

#include "../roi_math.h"

namespace mrcnn_edu {

// For the mean: the cells each bin sums along one axis and their weights, samples that share a cell merged.
// Bin b has the entries begin[b] to begin[b + 1].
template <typename T>
struct MeanTaps {
  std::vector<int> cell;
  std::vector<T> weight;
  std::vector<size_t> begin;

  void build(const Axis<T>& axis) {
    cell.clear();
    weight.clear();
    begin.assign(1, 0);
    for (int bin = 0; bin < axis.bins; ++bin) {
      const Samples<T> samples = samples_of_bin(axis, bin);
      for (int i = 0; i < samples.count; ++i) {
        const Taps<T> taps = taps_at(samples.position(i), axis.cells);
        add(taps.low, taps.low_weight / T(samples.count));
        add(taps.high, taps.high_weight / T(samples.count));
      }
      begin.push_back(cell.size());
    }
  }

  int count(int bin) const { return static_cast<int>(begin[bin + 1] - begin[bin]); }

  int largest_count() const {
    int largest = 0;
    for (size_t bin = 0; bin + 1 < begin.size(); ++bin) largest = std::max(largest, count(static_cast<int>(bin)));
    return largest;
  }

 private:
  // Samples advance steadily, so a shared cell is among the last two entries of the bin.
  void add(int index, T share) {
    if (share == T(0)) return;
    for (size_t back = 1; back <= 2 && cell.size() >= begin.back() + back; ++back) {
      if (cell[cell.size() - back] == index) {
        weight[weight.size() - back] += share;
        return;
      }
    }
    cell.push_back(index);
    weight.push_back(share);
  }
};

// The cells one bin sums, as rows of numbers, and their weights: every cell of the y axis with every one of the x axis.
template <typename Cell, typename A>
struct BinRows {
  std::vector<Cell*> row;
  std::vector<A> weight;

  void reserve(const MeanTaps<A>& ys, const MeanTaps<A>& xs) {
    const size_t most = size_t(ys.largest_count()) * xs.largest_count();
    if (row.size() < most) row.resize(most), weight.resize(most);
  }

  // Returns how many there are. `cells` is the first cell of the image.
  int64_t fill(const MeanTaps<A>& ys, const MeanTaps<A>& xs, int by, int bx, Cell* cells, int64_t width, int64_t step) {
    int64_t rows = 0;
    for (size_t y = ys.begin[by]; y < ys.begin[by + 1]; ++y) {
      Cell* line = cells + ys.cell[y] * width * step;
      for (size_t x = xs.begin[bx]; x < xs.begin[bx + 1]; ++x, ++rows) {
        row[rows] = line + xs.cell[x] * step;
        weight[rows] = ys.weight[y] * xs.weight[x];
      }
    }
    return rows;
  }
};

// For the maximum: the taps of every sample; bin b has the entries begin[b] to begin[b + 1].
template <typename T>
struct SampleTaps {
  std::vector<Taps<T>> taps;
  std::vector<size_t> begin;

  void build(const Axis<T>& axis) {
    taps.clear();
    begin.assign(1, 0);
    for (int bin = 0; bin < axis.bins; ++bin) {
      const Samples<T> samples = samples_of_bin(axis, bin);
      for (int i = 0; i < samples.count; ++i) taps.push_back(taps_at(samples.position(i), axis.cells));
      begin.push_back(taps.size());
    }
  }

  int count(int bin) const { return static_cast<int>(begin[bin + 1] - begin[bin]); }
  const Taps<T>& at(int bin, int sample) const { return taps[begin[bin] + sample]; }
};

}  // namespace mrcnn_edu
