// Cholesky factor of one matrix, and substitution in a tile of right-hand sides, by a team of threads that share memory: a
// block on a GPU, threads with a barrier in a test. A factor is stored by panels of kPanel columns. No torch headers here.

#pragma once

#include <cmath>
#include <cstdint>

#include "problem.h"

namespace slimllm {

constexpr int kPanel = 32;     // columns of a panel, and rows by which a tile advances
constexpr int kPanelMost = 256;  // rows of a matrix

// Factors A = L Lᵀ: L (K, K) by rows, its lower half only, and in place of its diagonal blocks their inverses.
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
    for (int e = team.lane(); e < (k - first) * width; e += team.width()) {
      const int i = e / width, c = e % width;
      if (i < c) continue;
      const T* row = l + static_cast<int64_t>(first + i) * k;
      const T* other = l + static_cast<int64_t>(first + c) * k;
      T sum = a[static_cast<int64_t>(first + i) * k + first + c];
      for (int j = 0; j < first; ++j) sum -= row[j] * other[j];
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
    for (int e = team.lane(); e < (k - first - width) * width; e += team.width()) {
      const int i = width + e / width, c = e % width;
      l[static_cast<int64_t>(first + i) * k + first + c] = panel[i * kRow + c];
    }
    for (int c = team.lane(); c < width; c += team.width()) {  // a column of the diagonal block's inverse
      T* to = l + static_cast<int64_t>(first) * k + first + c;
      for (int i = c; i < width; ++i) {
        T sum = i == c;
        for (int t = c; t < i; ++t) sum -= panel[i * kRow + t] * to[static_cast<int64_t>(t) * k];
        to[static_cast<int64_t>(i) * k] = sum / panel[i * kRow + i];
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
  static SLIMLLM_HOST_DEVICE int numbers(int k) { return (k + 2 * kPanel - 1) / kPanel * kPanel * kWidth; }

  SLIMLLM_DEVICE PanelTile(const T* factor, int size, T* memory, const Team& the_team)
      : l(factor), k(size), tile(memory), next(memory + numbers(size) - kPanel * kWidth), team(the_team) {}

  // right and solution: (K, M), of which columns first … first + kWidth - 1 are solved; `solution` may be missing. Returns
  // the sum of the squares of this thread's part of the result.
  SLIMLLM_DEVICE double run(const T* right, T* solution, int64_t m, int64_t first) {
    for (T* at = tile + team.lane(); at < next; at += team.width()) {
      const int64_t i = (at - tile) / kWidth, c = first + (at - tile) % kWidth;
      *at = i < k && c < m ? right[i * m + c] : T(0);
    }
    team.sync();
    double squares = 0;
    for (int block = 0; block < k; block += kPanel) squares += advance(block);
    for (int e = team.lane(); e < k * kWidth && solution; e += team.width()) {
      const int64_t i = e / kWidth, c = first + e % kWidth;
      if (c < m) solution[i * m + c] = tile[e];
    }
    return squares;
  }

 private:
  static constexpr int kRows = 4;                       // rows of a thread
  static constexpr int kParts = kPanel / kRows * 32;  // threads that have work

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
      squares += static_cast<double>(value) * static_cast<double>(value);
    }
    team.sync();
    return squares;
  }

  // Adds or subtracts L[row …, column] times a row of the tile; there is no L beyond its lower half.
  template <int SIGN>
  SLIMLLM_DEVICE void add(int row, int column, const T* from, T (&sum)[kRows][kEach]) const {
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= k || row + r < column) continue;
      const T left = SIGN * l[static_cast<int64_t>(row + r) * k + column];
      for (int e = 0; e < kEach; ++e) sum[r][e] += left * from[32 * e];
    }
  }

  const T* l;
  const int k;
  T* tile;
  T* next;
  const Team& team;
};

}  // namespace slimllm
