// What one axis contributes, worked out once per RoI instead of once per bin of the other axis.
#pragma once

#include <algorithm>
#include <vector>

#include "../roi_math.h"

namespace mrcnn_edu {

inline size_t largest_part(const std::vector<size_t>& begin) {
  size_t largest = 0;
  for (size_t i = 0; i + 1 < begin.size(); ++i) largest = std::max(largest, begin[i + 1] - begin[i]);
  return largest;
}

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

  // The cells of this axis, each once and in ascending order; the taps then count among these.
  std::vector<int> renumber() {
    std::vector<int> cells = cell;
    std::sort(cells.begin(), cells.end());
    cells.erase(std::unique(cells.begin(), cells.end()), cells.end());
    for (int& index : cell) {
      index = static_cast<int>(std::lower_bound(cells.begin(), cells.end(), index) - cells.begin());
    }
    return cells;
  }

 private:
  // Samples advance steadily, so a shared cell is among the last entries of the bin (three when they go backwards).
  void add(int index, T share) {
    if (share == T(0)) return;
    for (size_t back = 1; back <= 3 && cell.size() >= begin.back() + back; ++back) {
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
    const size_t most = largest_part(ys.begin) * largest_part(xs.begin);
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

// The same seen from the cells, for the backward pass: which bins read each of them, and with what weight.
// The i-th cell has the entries begin[i] to begin[i + 1].
template <typename T>
struct CellTaps {
  std::vector<int> cell;  // each once and in ascending order
  std::vector<int> bin;
  std::vector<T> weight;
  std::vector<size_t> begin;

  void build(MeanTaps<T> taps) {
    cell = taps.renumber();
    begin.assign(cell.size() + 1, 0);
    for (const int index : taps.cell) ++begin[index + 1];
    for (size_t i = 0; i < cell.size(); ++i) begin[i + 1] += begin[i];
    bin.resize(taps.cell.size());
    weight.resize(taps.cell.size());
    std::vector<size_t> next = begin;
    for (size_t b = 0; b + 1 < taps.begin.size(); ++b) {
      for (size_t tap = taps.begin[b]; tap < taps.begin[b + 1]; ++tap) {
        const size_t place = next[taps.cell[tap]]++;
        bin[place] = static_cast<int>(b);
        weight[place] = taps.weight[tap];
      }
    }
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
