// Arguments and results of the solvers, shared by the CPU and GPU code. No torch headers here.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SLIMLLM_HOST_DEVICE __host__ __device__
#define SLIMLLM_DEVICE __device__
#else
#define SLIMLLM_HOST_DEVICE
#define SLIMLLM_DEVICE
#endif

namespace slimllm {

// A batch of least-squares problems as normal equations. All arrays are contiguous: gram (B, K, K), only the lower half is read; cross and solution (B, K, M); the others (B,).
template <typename T>
struct Problem {
  const T* gram;
  const T* cross;
  const double* ridge;
  T* solution;
  double* used;
  int32_t* status;
  int64_t batch, k, m;
  bool absolute;

  // The absolute ridge of system b; a relative ridge is a multiple of the mean of its diagonal.
  SLIMLLM_HOST_DEVICE double absolute_ridge(int64_t b) const {
    if (absolute) return ridge[b];
    const T* g = gram + b * k * k;
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += static_cast<double>(g[i * k + i]);
    return ridge[b] * (sum / static_cast<double>(k));
  }

  // Whether system b can be positive semidefinite, judged by its ridge (from `absolute_ridge`) and its diagonal: where the
  // diagonal is 0, the row and the column must be 0.
  SLIMLLM_HOST_DEVICE bool makes_sense(int64_t b, double used_ridge) const {
    if (!(ridge[b] >= 0) || !std::isfinite(used_ridge)) return false;
    const T* g = gram + b * k * k;
    for (int64_t i = 0; i < k; ++i) {
      const T diagonal = g[i * k + i];
      if (diagonal > 0) continue;
      if (!(diagonal == 0)) return false;
      for (int64_t j = 0; j < k; ++j) {
        if (!((j < i ? g[i * k + j] : g[j * k + i]) == 0)) return false;
      }
    }
    return true;
  }
};

// L⁻¹ R of a batch of matrices A = L Lᵀ in place of R, or without `solve` the sums of its squares, `forms`, which are
// tr(Rᵀ A⁻¹ R). Both are NaN, and `failed` 1, for a matrix that is not positive definite. All arrays are contiguous: matrices
// (B, K, K), only the lower half is read; right (B, K, M); the others (B,).
template <typename T>
struct HalfProblem {
  const T* matrices;
  T* right;
  double* forms;
  int32_t* failed;
  int64_t batch, k, m;
  bool solve;
};

}  // namespace slimllm
