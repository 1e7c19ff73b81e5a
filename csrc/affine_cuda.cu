// slimllm_C::affine_fit on a GPU: one thread per output. Uses only torch's stable ABI and the CUDA runtime.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <tuple>

#include "affine.h"
#include "launch.h"
#include "tensors.h"

namespace slimllm {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) fit(const AffineFit<T> problem) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < problem.size) problem.fit(i);
}

std::tuple<Tensor, Tensor> affine_fit(const Tensor& mean_y, const Tensor& mean_y_hat, const Tensor& variance_y_hat,
                                      const Tensor& covariance) {
  const torch::stable::accelerator::DeviceGuard guard(mean_y.get_device_index());
  return affine_fit_on(mean_y, mean_y_hat, variance_y_hat, covariance, [&](const auto& problem) {
    if (problem.size == 0) return;
    fit<<<static_cast<unsigned>((problem.size + kThreads - 1) / kThreads), kThreads, 0, current_stream(mean_y)>>>(problem);
    check_launch("affine_fit");
  });
}

}  // namespace
}  // namespace slimllm

STABLE_TORCH_LIBRARY_IMPL(slimllm_C, CUDA, m) { m.impl("affine_fit", TORCH_BOX(&slimllm::affine_fit)); }
