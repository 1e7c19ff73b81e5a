// Cholesky factor of one matrix, and substitution in a tile of right-hand sides, by a team of threads that share memory: a
// block on a GPU, threads with a barrier in a test. A factor is made by panels of kPanel columns. No torch headers here.

#pragma once

#include <cmath>
#include <cstdint>

#include "problem.h"

namespace slimllm {

constexpr int kPanel = 32;       // columns of a panel, and rows by which a tile advances
constexpr int kPanelMost = 256;  // rows of a matrix

// Numbers of a column of a factor: K, and as many as make it a multiple of kPanel.
inline SLIMLLM_HOST_DEVICE int padded(int k) { return (k + kPanel - 1) / kPanel * kPanel; }

// Factors A = L Lᵀ. The factor has L by columns, (K, padded(K)), so that threads read the rows of a column together. In place of
// the diagonal blocks of kPanel rows are their inverses, with zeros above the diagonal and beyond K; the rest of L's upper
// half is not written.
template <typename T, typename Team>
class PanelFactor {
 public:
  // Numbers of shared memory. A row of the panel has an odd length, so that threads on one column access different banks.
  static SLIMLLM_HOST_DEVICE int numbers(int k) { return k * kRow; }

  // a: A (K, K), only the lower half is read. Returns whether all pivots are positive.
  static SLIMLLM_DEVICE bool run(const T* a, T* l, int k, T* panel, const Team& team) {
    bool regular = true;
    for (int first = 0; first < k; first += kPanel) {
      const int width = k - first < kPanel ? k - first : kPanel;
      load(a, l, k, first, width, panel, team);
      team.sync();
      for (int c = 0; c < width; ++c) regular = column(k - first, c, width, panel, team) && regular;
      store(l, k, first, width, panel, team);
      team.sync();
    }
    return regular;
  }

 private:
  static constexpr int kRow = kPanel + 1;

  // Panel ← A less the products of the panels before it.
  static SLIMLLM_DEVICE void load(const T* a, const T* l, int k, int first, int width, T* panel, const Team& team) {
    const int64_t length = padded(k);
    for (int e = team.lane(); e < (k - first) * width; e += team.width()) {
      const int i = e / width, c = e % width;
      if (i < c) continue;
      T sum = a[static_cast<int64_t>(first + i) * k + first + c];
      for (int j = 0; j < first; ++j) sum -= l[j * length + first + i] * l[j * length + first + c];
      panel[i * kRow + c] = sum;
    }
  }

  // Factors one column and subtracts it from the later ones of the panel.
  static SLIMLLM_DEVICE bool column(int rows, int c, int width, T* panel, const Team& team) {
    const T pivot = panel[c * kRow + c];
    const bool positive = pivot > 0 && pivot < static_cast<T>(INFINITY);  // a NaN is not
    const T inverse = 1 / std::sqrt(positive ? pivot : T(1));
    team.sync();
    for (int i = c + team.lane(); i < rows; i += team.width()) panel[i * kRow + c] *= inverse;
    team.sync();
    const int later = width - c - 1;
    for (int e = team.lane(); e < (rows - c - 1) * later; e += team.width()) {
      const int i = c + 1 + e / later, d = c + 1 + e % later;
      if (i >= d) panel[i * kRow + d] -= panel[i * kRow + c] * panel[d * kRow + c];
    }
    team.sync();
    return positive;
  }

  static SLIMLLM_DEVICE void store(T* l, int k, int first, int width, const T* panel, const Team& team) {
    const int64_t length = padded(k);
    const int below = padded(k) - first - kPanel;
    for (int e = team.lane(); e < below * width; e += team.width()) {
      const int i = kPanel + e % below, c = e / below;
      l[(first + c) * length + first + i] = first + i < k ? panel[i * kRow + c] : T(0);
    }
    for (int c = team.lane(); c < width; c += team.width()) {  // a column of the diagonal block's inverse
      T* to = l + (first + c) * length + first;
      for (int i = 0; i < kPanel; ++i) {
        T sum = i == c;
        for (int t = c; t < i && i < width; ++t) sum -= panel[i * kRow + t] * to[t];
        to[i] = i < c || i >= width ? T(0) : sum / panel[i * kRow + i];
      }
    }
  }
};

// Substitution in a tile of columns: tile ← L⁻¹ tile.
template <typename T, typename Team>
class PanelTile {
 public:
  static constexpr int kEach = sizeof(T) == 4 ? 2 : 1;  // columns of a thread, 32 apart
  static constexpr int kWidth = 32 * kEach;

  // Numbers of shared memory: the tile, whose rows are a multiple of kPanel, and kPanel rows more.
  static SLIMLLM_HOST_DEVICE int numbers(int k) { return (padded(k) + kPanel) * kWidth; }

  SLIMLLM_DEVICE PanelTile(const T* factor, int size, T* memory, const Team& the_team)
      : l(factor), k(size), length(padded(size)), tile(memory), next(memory + padded(size) * kWidth), team(the_team) {}

  // right: (K, M), of which columns first … first + kWidth - 1 are solved, in place if `store`. Returns the sum of the squares
  // of this thread's part of the result.
  SLIMLLM_DEVICE double run(T* right, bool store, int64_t m, int64_t first) {
    for (T* at = tile + team.lane(); at < next; at += team.width()) {
      const int64_t i = (at - tile) / kWidth, c = first + (at - tile) % kWidth;
      *at = i < k && c < m ? right[i * m + c] : T(0);
    }
    team.sync();
    double squares = 0;
    for (int block = 0; block < k; block += kPanel) squares += advance(block);
    for (int e = team.lane(); e < k * kWidth && store; e += team.width()) {
      const int64_t i = e / kWidth, c = first + e % kWidth;
      if (c < m) right[i * m + c] = tile[e];
    }
    return squares;
  }

 private:
  static constexpr int kRows = 4;                       // rows of a thread
  static constexpr int kParts = kPanel / kRows * 32;  // threads that have work

  // Rows of a column of L, which one instruction reads.
  struct alignas(16) Rows {
    T of[kRows];
  };

  // Solves kPanel rows, given those before them.
  SLIMLLM_DEVICE double advance(int block) {
    for (int part = team.lane(); part < kParts; part += team.width()) {
      const int row = block + part / 32 * kRows, column = part % 32;
      T sum[kRows][kEach];
      for (int r = 0; r < kRows; ++r) {
        for (int e = 0; e < kEach; ++e) sum[r][e] = tile[(row + r) * kWidth + column + 32 * e];
      }
      for (int j = 0; j < block; ++j) add<-1>(row, j, tile + j * kWidth + column, sum);
      for (int r = 0; r < kRows; ++r) {
        for (int e = 0; e < kEach; ++e) tile[(row + r) * kWidth + column + 32 * e] = sum[r][e];
      }
    }
    team.sync();
    for (int part = team.lane(); part < kParts; part += team.width()) {
      const int row = block + part / 32 * kRows, column = part % 32;
      T sum[kRows][kEach] = {};
      for (int j = block; j < row + kRows && j < k; ++j) add<1>(row, j, tile + j * kWidth + column, sum);
      for (int r = 0; r < kRows; ++r) {
        for (int e = 0; e < kEach; ++e) next[(row - block + r) * kWidth + column + 32 * e] = sum[r][e];
      }
    }
    team.sync();
    double squares = 0;
    for (int e = team.lane(); e < kPanel * kWidth; e += team.width()) {
      const T value = tile[block * kWidth + e] = next[e];
      if (block + e / kWidth < k) squares += static_cast<double>(value) * static_cast<double>(value);
    }
    team.sync();
    return squares;
  }

  // Adds L[row …, column], of a diagonal block, times a row of the tile, or subtracts it, of other blocks.
  template <int SIGN>
  SLIMLLM_DEVICE void add(int row, int column, const T* from, T (&sum)[kRows][kEach]) const {
    const Rows left = *reinterpret_cast<const Rows*>(l + column * length + row);
    for (int r = 0; r < kRows; ++r) {
      if (SIGN > 0 && row + r < column) continue;  // in a diagonal block, where an infinity must not meet a zero
      for (int e = 0; e < kEach; ++e) sum[r][e] += SIGN * left.of[r] * from[32 * e];
    }
  }

  const T* l;
  const int k;
  const int64_t length;  // of a column of L
  T* tile;
  T* next;
  const Team& team;
};

}  // namespace slimllm
