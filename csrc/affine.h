// Regression of each dense output on its pruned output, from their moments. No torch headers here.

#pragma once

#include <cstdint>

#include "problem.h"

namespace slimllm {

// All arrays are (size,).
template <typename T>
struct AffineFit {
  const T* mean_y;
  const T* mean_y_hat;
  const T* variance_y_hat;
  const T* covariance;
  T* slope;
  T* intercept;
  int64_t size;

  // Fits output i. Where ŷ is constant, up to the rounding of fp32 activations, the slope is undetermined and set to 1.
  SLIMLLM_HOST_DEVICE void fit(int64_t i) const {
    const T mean = mean_y_hat[i], variance = variance_y_hat[i];
    const T noise = static_cast<T>(1e-14) * (variance + mean * mean);
    const T a = variance <= noise ? static_cast<T>(1) : covariance[i] / variance;
    slope[i] = a;
    intercept[i] = mean_y[i] - a * mean;
  }
};

}  // namespace slimllm
