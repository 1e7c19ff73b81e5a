// slimllm_C::half_solve_ and slimllm_C::quadratic_forms on a GPU: a block factors a matrix, then blocks solve its tiles. Uses
// only torch's stable ABI and the CUDA runtime.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "launch.h"
#include "panels.h"
#include "tensors.h"

namespace slimllm {
namespace {

constexpr int kThreads = 256;

struct Block {
  __device__ int lane() const { return static_cast<int>(threadIdx.x); }
  __device__ int width() const { return kThreads; }
  __device__ void sync() const { __syncthreads(); }
};

template <typename T>
__device__ T* shared_memory() {
  extern __shared__ double memory[];
  return reinterpret_cast<T*>(memory);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) factorise(const HalfProblem<T> problem, T* factors) {
  const int k = static_cast<int>(problem.k);
  const int64_t b = blockIdx.x;
  T* own = factors + b * k * padded(k);
  const bool regular = PanelFactor<T, Block>::run(problem.matrices + b * k * k, own, k, shared_memory<T>(), Block());
  if (threadIdx.x == 0) problem.failed[blockIdx.x] = regular ? 0 : 1;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) solve(const HalfProblem<T> problem, const T* factors, double* squares) {
  const int64_t b = blockIdx.y, k = problem.k, m = problem.m;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * PanelTile<T, Block>::kWidth;
  const Block block;
  T* right = problem.right + b * k * m;
  PanelTile<T, Block> tile(factors + b * k * padded(static_cast<int>(k)), static_cast<int>(k), shared_memory<T>(), block);
  double sum = tile.run(right, problem.solve, m, first);
  if (problem.failed[b]) {
    for (int64_t e = threadIdx.x; e < k * PanelTile<T, Block>::kWidth && problem.solve; e += kThreads) {
      const int64_t i = e / PanelTile<T, Block>::kWidth, c = first + e % PanelTile<T, Block>::kWidth;
      if (c < m) right[i * m + c] = static_cast<T>(NAN);
    }
    sum = NAN;
  }
  if (problem.solve) return;
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {  // always in the same order
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) squares[b * gridDim.x + blockIdx.x] = sums[0];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) add_up(const HalfProblem<T> problem, const double* squares, int64_t tiles) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= problem.batch) return;
  double sum = 0;
  for (int64_t i = 0; i < tiles; ++i) sum += squares[b * tiles + i];
  problem.forms[b] = sum;
}

template <typename Kernel>
void allow(Kernel kernel, int bytes) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  cudaGetLastError();  // so that no later launch reports it
  STD_TORCH_CHECK(status == cudaSuccess, "this GPU does not have the shared memory that a matrix needs, ", bytes, " bytes: ",
                  cudaGetErrorString(status));
}

template <typename T>
void run(const HalfProblem<T>& problem, const Tensor& matrices) {
  const int64_t k = problem.k, tiles = (problem.m + PanelTile<T, Block>::kWidth - 1) / PanelTile<T, Block>::kWidth;
  STD_TORCH_CHECK(k <= kPanelMost && problem.batch <= std::numeric_limits<uint16_t>::max(),
                  "up to 256 rows and 65535 matrices at once, got ", k, " and ", problem.batch, ".");
  if (problem.batch == 0) return;
  const int64_t sizes[] = {problem.batch, k, padded(static_cast<int>(k))};
  const Tensor factors = torch::stable::new_empty(matrices, sizes);
  const Tensor squares = torch::stable::new_empty(matrices, {problem.solve ? 0 : problem.batch * tiles}, ScalarType::Double);
  T* l = static_cast<T*>(factors.mutable_data_ptr());
  double* sums = static_cast<double*>(squares.mutable_data_ptr());
  const unsigned batch = static_cast<unsigned>(problem.batch);
  const cudaStream_t stream = current_stream(matrices);
  const int panel = PanelFactor<T, Block>::numbers(static_cast<int>(k)) * static_cast<int>(sizeof(T));
  allow(factorise<T>, panel);
  factorise<T><<<batch, kThreads, panel, stream>>>(problem, l);
  if (tiles > 0) {
    const int tile = PanelTile<T, Block>::numbers(static_cast<int>(k)) * static_cast<int>(sizeof(T));
    allow(solve<T>, tile);
    solve<T><<<dim3(static_cast<unsigned>(tiles), batch), kThreads, tile, stream>>>(problem, l, sums);
  }
  if (!problem.solve) add_up<T><<<(batch + kThreads - 1) / kThreads, kThreads, 0, stream>>>(problem, sums, tiles);
  check_launch(problem.solve ? "half_solve_" : "quadratic_forms");
}

Tensor half_solve_(const Tensor& matrices, const Tensor& right) {
  const torch::stable::accelerator::DeviceGuard guard(matrices.get_device_index());
  return std::get<1>(halves_on(matrices, right, true, [&](const auto& problem) { run(problem, matrices); }));
}

std::tuple<Tensor, Tensor> quadratic_forms(const Tensor& matrices, const Tensor& right) {
  const torch::stable::accelerator::DeviceGuard guard(matrices.get_device_index());
  return halves_on(matrices, right, false, [&](const auto& problem) { run(problem, matrices); });
}

}  // namespace
}  // namespace slimllm

STABLE_TORCH_LIBRARY_IMPL(slimllm_C, CUDA, m) {
  m.impl("half_solve_", TORCH_BOX(&slimllm::half_solve_));
  m.impl("quadratic_forms", TORCH_BOX(&slimllm::quadratic_forms));
}
