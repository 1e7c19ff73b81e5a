// slimllm_C::affine_fit on a CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <tuple>

#include "affine.h"
#include "tensors.h"

namespace slimllm {
namespace {

std::tuple<Tensor, Tensor> affine_fit(const Tensor& mean_y, const Tensor& mean_y_hat, const Tensor& variance_y_hat,
                                      const Tensor& covariance) {
  return affine_fit_on(mean_y, mean_y_hat, variance_y_hat, covariance, [](const auto& problem) {
    torch::stable::parallel_for(0, problem.size, 32768, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) problem.fit(i);
    });
  });
}

}  // namespace
}  // namespace slimllm

STABLE_TORCH_LIBRARY_IMPL(slimllm_C, CPU, m) { m.impl("affine_fit", TORCH_BOX(&slimllm::affine_fit)); }
