// Cholesky factor A = L Lᵀ of a symmetric positive definite matrix, and substitution for many right-hand sides, a tile of
// columns at a time. A matrix has at most some hundred rows, so that its factor and a tile fit a core's caches. No torch
// headers here.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "problem.h"

namespace slimllm {

// Solves least-squares problems of any number of right-hand sides.
void solve_wide(const Problem<float>& problem);
void solve_wide(const Problem<double>& problem);

#if defined(__GNUC__)
template <typename T, int BYTES>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
  static constexpr int lanes = BYTES / sizeof(T);
};
#else
template <typename T, int BYTES>
struct Vector {
  using type = T;
  static constexpr int lanes = 1;
};
#endif

// How an instruction set's registers are used: ROWS rows of L meet VECTORS vectors of columns, all sums in registers.
template <int BYTES_, int ROWS_, int VECTORS_>
struct Registers {
  static constexpr int BYTES = BYTES_, ROWS = ROWS_, VECTORS = VECTORS_;
};

// The factor of one matrix. Rows beyond K, which make it a multiple of ROWS, are 0.
template <typename T, int ROWS>
struct Factor {
  explicit Factor(int64_t size)
      : k(size), blocks((size + ROWS - 1) / ROWS), row(blocks * ROWS), lower(row * row), packed(row * row / 2), inverse(row),
        column(kColumns * row) {}

  static constexpr int kColumns = 4;  // whose products are subtracted from the later columns at once

  int64_t k, blocks, row;
  std::vector<T> lower;    // A, then L, lower half, [i][j]
  std::vector<T> packed;   // L left of the diagonal blocks, by blocks of rows: [i / ROWS][j][i % ROWS]
  std::vector<T> inverse;  // 1 / L_ii, 0 for a column of zeros
  std::vector<T> column;   // those columns

  // Factors `lower`, whose pivots must exceed `least` times the diagonal; returns whether they do. A column of zeros is
  // left out if `zeros`.
  bool factorise(T least, bool zeros) {
    bool regular = true;
    for (int64_t i = 0; i < k; ++i) inverse[i] = least * lower[i * row + i];
    T* columns[kColumns];
    for (int c = 0; c < kColumns; ++c) columns[c] = column.data() + c * row;
    for (int64_t first = 0; first < k; first += kColumns) {
      const int64_t last = std::min<int64_t>(first + kColumns, k);
      for (int64_t j = first; j < last; ++j) {
        const T pivot = lower[j * row + j];
        const bool dead = zeros && pivot == 0 && inverse[j] == 0;
        regular = regular && (dead || (pivot > inverse[j] && pivot <= std::numeric_limits<T>::max()));  // a NaN is neither
        const T inv = inverse[j] = dead ? 0 : 1 / std::sqrt(pivot > 0 ? pivot : 1);
        T* own = columns[j - first];
        for (int64_t i = j + 1; i < k; ++i) {
          T* to = lower.data() + i * row;
          own[i] = to[j] *= inv;
          for (int64_t r = j + 1; r < std::min(last, i + 1); ++r) to[r] -= own[i] * own[r];
        }
      }
      if (last < first + kColumns) break;  // these were the last rows
      for (int64_t i = last; i < k; ++i) {
        T* to = lower.data() + i * row;
        const T l0 = columns[0][i], l1 = columns[1][i], l2 = columns[2][i], l3 = columns[3][i];
        for (int64_t r = last; r <= i; ++r) {
          to[r] -= l0 * columns[0][r] + l1 * columns[1][r] + l2 * columns[2][r] + l3 * columns[3][r];
        }
      }
    }
    T* to = packed.data();
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t j = 0; j < block * ROWS; ++j) {
        for (int r = 0; r < ROWS; ++r) *to++ = lower[(block * ROWS + r) * row + j];
      }
    }
    return regular;
  }
};

// Substitution in a tile of right-hand sides, (row, WIDTH).
template <typename T, typename R>
struct Tile {
  static constexpr int ROWS = R::ROWS, VECTORS = R::VECTORS, LANES = Vector<T, R::BYTES>::lanes, WIDTH = VECTORS * LANES;
  using V = typename Vector<T, R::BYTES>::type;

  explicit Tile(int64_t rows) : values(rows * WIDTH) {}

  std::vector<T> values;

  T* row(int64_t i) { return values.data() + i * WIDTH; }
  V* at(int64_t i) { return reinterpret_cast<V*>(row(i)); }
  void clear() { std::fill(values.begin(), values.end(), T(0)); }

  // tile ← L⁻¹ tile; returns the sum of the squares of the result.
  double forward(const Factor<T, ROWS>& f) {
    V squares[VECTORS] = {};
    const T* left = f.packed.data();
    for (int64_t first = 0; first < f.row; first += ROWS) {
      V sum[ROWS][VECTORS];
      for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = at(first + r)[v];
      }
      for (int64_t j = 0; j < first; ++j, left += ROWS) subtract(sum, left, at(j));
      for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) sum[r][v] *= f.inverse[first + r];
        for (int below = r + 1; below < ROWS; ++below) {
          const T factor = f.lower[(first + below) * f.row + first + r];
          for (int v = 0; v < VECTORS; ++v) sum[below][v] -= factor * sum[r][v];
        }
      }
      for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) {
          at(first + r)[v] = sum[r][v];
          squares[v] += sum[r][v] * sum[r][v];
        }
      }
    }
    double total = 0;
    const T* each = reinterpret_cast<const T*>(squares);
    for (int i = 0; i < WIDTH; ++i) total += static_cast<double>(each[i]);
    return total;
  }

  // tile ← L⁻ᵀ tile.
  void backward(const Factor<T, ROWS>& f) {
    for (int64_t first = f.row - ROWS; first >= 0; first -= ROWS) {
      V sum[ROWS][VECTORS];
      for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = at(first + r)[v];
      }
      const T* left = f.lower.data() + first;
      for (int64_t j = first + ROWS; j < f.row; ++j) subtract(sum, left + j * f.row, at(j));
      for (int r = ROWS - 1; r >= 0; --r) {
        for (int v = 0; v < VECTORS; ++v) sum[r][v] *= f.inverse[first + r];
        for (int above = 0; above < r; ++above) {
          const T factor = f.lower[(first + r) * f.row + first + above];
          for (int v = 0; v < VECTORS; ++v) sum[above][v] -= factor * sum[r][v];
        }
      }
      for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) at(first + r)[v] = sum[r][v];
      }
    }
  }

  static void subtract(V (&sum)[ROWS][VECTORS], const T* left, const V* right) {
    V each[VECTORS];
    for (int v = 0; v < VECTORS; ++v) each[v] = right[v];
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < VECTORS; ++v) sum[r][v] -= left[r] * each[v];
    }
  }
};

}  // namespace slimllm
