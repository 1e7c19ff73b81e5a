// Cholesky factorisation and solution of small systems, LANES at a time. Elements (i, j) of all systems are adjacent in
// memory, so that every operation is one vector operation, whatever the size of a system. No torch headers here.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace slimllm {

// Workspace and results of LANES systems (K, K) with M right-hand sides, all in fp64, whose range needs no scaling.
template <int LANES>
struct Lanes {
  explicit Lanes(int64_t size, int64_t columns)
      : k(size), m(columns), system(size * size * LANES), right(size * columns * LANES), inverse(size * LANES) {}

  int64_t k, m;
  std::vector<double> system;   // G, lower half, [i][j][lane]; then L, strictly lower half
  std::vector<double> right;    // R, then X, [i][column][lane]
  std::vector<double> inverse;  // 1 / L_ii, 0 for a column of zeros
  double ridge[LANES] = {};     // λ
  bool regular[LANES] = {};     // whether G + λI is positive definite to working precision

  double* row(int64_t i) { return system.data() + i * k * LANES; }

  // Factors G + λI = L Lᵀ column by column; each column is subtracted from the later columns at once.
  void factorise() {
    const double least = static_cast<double>(k) * std::numeric_limits<double>::epsilon();
    for (int lane = 0; lane < LANES; ++lane) regular[lane] = true;
    for (int64_t i = 0; i < k; ++i) {  // until its column is factored, inverse holds the bound that the pivot must exceed
      for (int lane = 0; lane < LANES; ++lane) {
        double& diagonal = row(i)[i * LANES + lane];
        diagonal = diagonal > 0 || diagonal < 0 ? diagonal + ridge[lane] : diagonal;
        inverse[i * LANES + lane] = least * diagonal;
      }
    }
    for (int64_t j = 0; j < k; ++j) {
      double* inv = inverse.data() + j * LANES;
      for (int lane = 0; lane < LANES; ++lane) {
        const double pivot = row(j)[j * LANES + lane];
        const bool zeros = inv[lane] == 0 && pivot == 0;
        regular[lane] = regular[lane] && (zeros || pivot > inv[lane]);  // a NaN compares false
        inv[lane] = zeros ? 0 : 1 / std::sqrt(pivot > 0 ? pivot : 1);
      }
      for (int64_t i = j + 1; i < k; ++i) {
        double* ri = row(i);
        double left[LANES];
        for (int lane = 0; lane < LANES; ++lane) left[lane] = ri[j * LANES + lane] * inv[lane];
        for (int lane = 0; lane < LANES; ++lane) ri[j * LANES + lane] = left[lane];
        for (int64_t r = j + 1; r <= i; ++r) {
          const double* from = row(r) + j * LANES;
          double to[LANES];  // keeps it in registers: the compiler cannot know that the rows do not overlap
          for (int lane = 0; lane < LANES; ++lane) to[lane] = ri[r * LANES + lane];
          for (int lane = 0; lane < LANES; ++lane) to[lane] -= left[lane] * from[lane];
          for (int lane = 0; lane < LANES; ++lane) ri[r * LANES + lane] = to[lane];
        }
      }
    }
  }

  // Solves in place: right ← (L Lᵀ)⁻¹ right.
  void solve() {
    for (int64_t i = 0; i < k; ++i) {
      const double* li = row(i);
      for (int64_t c = 0; c < m; ++c) {
        double* x = right.data() + (i * m + c) * LANES;
        double sum[LANES];
        for (int lane = 0; lane < LANES; ++lane) sum[lane] = x[lane];
        for (int64_t t = 0; t < i; ++t) {
          const double* y = right.data() + (t * m + c) * LANES;
          for (int lane = 0; lane < LANES; ++lane) sum[lane] -= li[t * LANES + lane] * y[lane];
        }
        for (int lane = 0; lane < LANES; ++lane) x[lane] = sum[lane] * inverse[i * LANES + lane];
      }
    }
    for (int64_t i = k - 1; i >= 0; --i) {
      for (int64_t c = 0; c < m; ++c) {
        double* x = right.data() + (i * m + c) * LANES;
        double sum[LANES];
        for (int lane = 0; lane < LANES; ++lane) sum[lane] = x[lane];
        for (int64_t t = i + 1; t < k; ++t) {
          const double* y = right.data() + (t * m + c) * LANES;
          const double* lt = row(t) + i * LANES;
          for (int lane = 0; lane < LANES; ++lane) sum[lane] -= lt[lane] * y[lane];
        }
        for (int lane = 0; lane < LANES; ++lane) x[lane] = sum[lane] * inverse[i * LANES + lane];
      }
    }
  }
};

}  // namespace slimllm
