// slimllm_C::greedy_elimination on a CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <tuple>

#include "clones.h"
#include "elimination.h"
#include "tensors.h"

namespace slimllm {
namespace {

SLIMLLM_CLONES void run(Elimination& elimination, int64_t* order, double* cost) { elimination.run(order, cost); }

// inverse: A, products: K, both (p, p) fp64; num: at most p; least: smallest pivot as a fraction of the largest A_cc.
// Returns the removed columns (num,) int64 and what each adds to J (num,) fp64.
std::tuple<Tensor, Tensor> greedy_elimination(const Tensor& inverse, const Tensor& products, int64_t num, double least) {
  STD_TORCH_CHECK(inverse.dim() == 2, "inverse must have two dimensions.");
  const int64_t p = inverse.size(0);
  check(inverse, "inverse", {p, p}, ScalarType::Double, inverse);
  check(products, "products", {p, p}, ScalarType::Double, inverse);
  STD_TORCH_CHECK(num >= 0 && num <= p, "num must be from 0 to the number of candidates.");
  Tensor order = torch::stable::new_empty(inverse, {num}, ScalarType::Long);
  Tensor cost = torch::stable::new_empty(inverse, {num}, ScalarType::Double);
  Elimination elimination(static_cast<const double*>(inverse.const_data_ptr()),
                          static_cast<const double*>(products.const_data_ptr()), p, num, least);
  run(elimination, static_cast<int64_t*>(order.mutable_data_ptr()), static_cast<double*>(cost.mutable_data_ptr()));
  return {order, cost};
}

}  // namespace
}  // namespace slimllm

STABLE_TORCH_LIBRARY_IMPL(slimllm_C, CPU, m) { m.impl("greedy_elimination", TORCH_BOX(&slimllm::greedy_elimination)); }
