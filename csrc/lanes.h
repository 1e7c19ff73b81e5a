// Cholesky factorisation and solution of small systems, LANES of them at a time: element (i, j) of all systems lies side
// by side, so that every operation is one vector operation, whatever the size of a system. No torch headers here.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace slimllm {

// Work space and results of LANES systems (K, K) with M right-hand sides, all in fp64.
template <int LANES>
struct Lanes {
  explicit Lanes(int64_t size, int64_t columns)
      : k(size),
        m(columns),
        gram(size * size * LANES),
        factor(size * size * LANES),
        right(size * columns * LANES),
        scale(size * LANES),
        inverse(size * LANES) {}

  int64_t k, m;
  std::vector<double> gram;     // G, lower half, [i][j][lane]
  std::vector<double> factor;   // L of S (G + λ) S, strictly lower half
  std::vector<double> right;    // R, then X, [i][column][lane]
  std::vector<double> scale;    // S: 1 / sqrt(G_ii + λ), 0 for a column of zeros
  std::vector<double> inverse;  // 1 / L_ii
  double ridge[LANES] = {};     // λ, absolute
  double least_pivot[LANES] = {};

  double* row(std::vector<double>& a, int64_t i) { return a.data() + i * k * LANES; }

  // S (G + λ) S = L Lᵀ, by rows. least_pivot is the smallest L_ii², not positive where the system is not definite.
  void factorise() {
    for (int lane = 0; lane < LANES; ++lane) least_pivot[lane] = std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < k; ++i) {
      const double* diagonal = row(gram, i) + i * LANES;
      double* s = scale.data() + i * LANES;
      for (int lane = 0; lane < LANES; ++lane) {
        s[lane] = diagonal[lane] > 0 ? 1 / std::sqrt(diagonal[lane] + ridge[lane]) : 0;
      }
      double* li = row(factor, i);
      double pivot[LANES];
      for (int lane = 0; lane < LANES; ++lane) pivot[lane] = 1;
      for (int64_t j = 0; j < i; ++j) {
        const double* lj = row(factor, j);
        const double* sj = scale.data() + j * LANES;
        const double* g = row(gram, i) + j * LANES;
        double sum[LANES];
        for (int lane = 0; lane < LANES; ++lane) sum[lane] = g[lane] * s[lane] * sj[lane];
        for (int64_t t = 0; t < j; ++t) {
          for (int lane = 0; lane < LANES; ++lane) sum[lane] -= li[t * LANES + lane] * lj[t * LANES + lane];
        }
        for (int lane = 0; lane < LANES; ++lane) {
          const double value = sum[lane] * inverse[j * LANES + lane];
          li[j * LANES + lane] = value;
          pivot[lane] -= value * value;
        }
      }
      for (int lane = 0; lane < LANES; ++lane) {
        // A NaN counts as not positive, and goes on no further.
        const double safe = pivot[lane] > 0 ? pivot[lane] : -1;
        least_pivot[lane] = safe < least_pivot[lane] ? safe : least_pivot[lane];
        inverse[i * LANES + lane] = 1 / std::sqrt(pivot[lane] > 0 ? pivot[lane] : 1);
      }
    }
  }

  // right ← S (L Lᵀ)⁻¹ S right.
  void solve() {
    for (int64_t i = 0; i < k; ++i) {
      const double* li = row(factor, i);
      for (int64_t c = 0; c < m; ++c) {
        double* x = right.data() + (i * m + c) * LANES;
        double sum[LANES];
        for (int lane = 0; lane < LANES; ++lane) sum[lane] = x[lane] * scale[i * LANES + lane];
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
          const double* lt = row(factor, t) + i * LANES;
          for (int lane = 0; lane < LANES; ++lane) sum[lane] -= lt[lane] * y[lane];
        }
        for (int lane = 0; lane < LANES; ++lane) x[lane] = sum[lane] * inverse[i * LANES + lane];
      }
    }
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t c = 0; c < m; ++c) {
        for (int lane = 0; lane < LANES; ++lane) right[(i * m + c) * LANES + lane] *= scale[i * LANES + lane];
      }
    }
  }

  // Whether the system is positive definite to working precision.
  bool regular(int lane) const {
    return least_pivot[lane] > static_cast<double>(k) * std::numeric_limits<double>::epsilon();
  }
};

}  // namespace slimllm
