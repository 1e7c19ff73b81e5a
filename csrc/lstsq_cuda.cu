// slimllm_C::small_lstsq on a GPU: one warp per system. Uses only torch's stable ABI and the CUDA runtime.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "launch.h"
#include "team.h"
#include "tensors.h"

namespace slimllm {
namespace {

constexpr int kWarp = 32;

struct Warp {
  __device__ int lane() const { return static_cast<int>(threadIdx.x); }
  __device__ int width() const { return kWarp; }
  __device__ void sync() const { __syncwarp(); }
};

template <typename T>
__global__ void __launch_bounds__(kWarp, 1) solve(const Problem<T> problem) {
  extern __shared__ double memory[];
  const Warp warp;
  TeamSolver<T, Warp>(problem, blockIdx.x, warp, memory).solve();
}

std::tuple<Tensor, Tensor, Tensor> small_lstsq(const Tensor& gram, const Tensor& cross, const Tensor& ridge, bool absolute) {
  const torch::stable::accelerator::DeviceGuard guard(gram.get_device_index());
  return small_lstsq_on(gram, cross, ridge, absolute, [&](const auto& problem) {
    STD_TORCH_CHECK(problem.k <= kTeamUnknowns && problem.batch <= std::numeric_limits<int32_t>::max(),
                    "up to 64 unknowns and 2147483647 systems at once, got ", problem.k, " and ", problem.batch, ".");
    if (problem.batch == 0) return;
    const int bytes = TeamMemory::bytes(static_cast<int>(problem.k));
    solve<<<static_cast<unsigned>(problem.batch), kWarp, bytes, current_stream(gram)>>>(problem);
    check_launch("small_lstsq");
  });
}

}  // namespace
}  // namespace slimllm

STABLE_TORCH_LIBRARY_IMPL(slimllm_C, CUDA, m) { m.impl("small_lstsq", TORCH_BOX(&slimllm::small_lstsq)); }
