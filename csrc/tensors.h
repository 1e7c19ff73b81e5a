// Tensor handling of the operators, the same on every device: checks and allocation. Uses only torch's stable ABI.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <tuple>

#include "problem.h"

namespace slimllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, ScalarType dtype,
                  const Tensor& beside) {
  const auto found = tensor.sizes();
  STD_TORCH_CHECK(found.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), found.begin()), name,
                  " has the wrong shape.");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype.");
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.device() == beside.device(), name,
                  " must be contiguous, and on the device of the others.");
}

inline void check_precise(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double, name,
                  " must be float32 or float64.");
}

// gram (B, K, K) and cross (B, K, M), both fp32 or both fp64; ridge (B,) fp64, relative to the mean of the diagonal unless
// `absolute`. Returns the solution (B, K, M), NaN for failed systems; the absolute ridge used (B,) fp64; and the status
// (B,) int32: 1 for a system that is singular to working precision or cannot be solved, else 0. slimllm.ops.lstsq checks
// the values of the arguments in Python.
template <typename Solve>
std::tuple<Tensor, Tensor, Tensor> small_lstsq_on(const Tensor& gram, const Tensor& cross, const Tensor& ridge,
                                                  bool absolute, const Solve& solve) {
  STD_TORCH_CHECK(gram.dim() == 3 && cross.dim() == 3, "gram and cross must have three dimensions.");
  const int64_t batch = gram.size(0), k = gram.size(1), m = cross.size(2);
  check_precise(gram, "gram");
  const ScalarType dtype = gram.scalar_type();
  check(gram, "gram", {batch, k, k}, dtype, gram);
  check(cross, "cross", {batch, k, m}, dtype, gram);
  check(ridge, "ridge", {batch}, ScalarType::Double, gram);
  Tensor solution = torch::stable::empty_like(cross);
  Tensor used = torch::stable::empty_like(ridge);
  Tensor status = torch::stable::new_empty(ridge, {batch}, ScalarType::Int);
  const auto on = [&](auto zero) {
    using T = decltype(zero);
    solve(Problem<T>{
        static_cast<const T*>(gram.const_data_ptr()),
        static_cast<const T*>(cross.const_data_ptr()),
        static_cast<const double*>(ridge.const_data_ptr()),
        static_cast<T*>(solution.mutable_data_ptr()),
        static_cast<double*>(used.mutable_data_ptr()),
        static_cast<int32_t*>(status.mutable_data_ptr()),
        batch,
        k,
        m,
        absolute,
    });
  };
  if (dtype == ScalarType::Float) {
    on(0.0f);
  } else {
    on(0.0);
  }
  return {solution, used, status};
}

// matrices (B, K, K) and right (B, K, M), both fp32 or both fp64. `right` becomes L⁻¹ R, or without `solve` it is left as it
// is. Returns tr(Rᵀ A⁻¹ R), (B,) fp64, empty with `solve`; and (B,) int32: 1 for a matrix that is not positive definite,
// else 0.
template <typename Run>
std::tuple<Tensor, Tensor> halves_on(const Tensor& matrices, const Tensor& right, bool solve, const Run& run) {
  STD_TORCH_CHECK(matrices.dim() == 3 && right.dim() == 3, "matrices and right must have three dimensions.");
  const int64_t batch = matrices.size(0), k = matrices.size(1), m = right.size(2);
  check_precise(matrices, "matrices");
  const ScalarType dtype = matrices.scalar_type();
  check(matrices, "matrices", {batch, k, k}, dtype, matrices);
  check(right, "right", {batch, k, m}, dtype, matrices);
  Tensor forms = torch::stable::new_empty(matrices, {solve ? 0 : batch}, ScalarType::Double);
  Tensor failed = torch::stable::new_empty(matrices, {batch}, ScalarType::Int);
  const auto on = [&](auto zero) {
    using T = decltype(zero);
    run(HalfProblem<T>{
        static_cast<const T*>(matrices.const_data_ptr()),
        static_cast<T*>(right.mutable_data_ptr()),
        static_cast<double*>(forms.mutable_data_ptr()),
        static_cast<int32_t*>(failed.mutable_data_ptr()),
        batch,
        k,
        m,
        solve,
    });
  };
  if (dtype == ScalarType::Float) {
    on(0.0f);
  } else {
    on(0.0);
  }
  return {forms, failed};
}

}  // namespace slimllm
