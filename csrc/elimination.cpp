// slimllm_C::greedy_elimination on a CPU: columns removed one by one among a few candidates, in one thread. Work:
// 3/2 n² p multiply-adds for n of p candidates, on arrays that fit a core's second cache.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "clones.h"
#include "tensors.h"

namespace slimllm {
namespace {

// The arrays of the steps taken so far, (steps, p): the row A_c:, the part A_c:/A_cc, and what K = V Vᵀ loses with it.
struct Steps {
  Steps(int64_t num, int64_t candidates) : p(candidates), rows(num * p), parts(num * p), shifts(num * p) {}

  int64_t p;
  std::vector<double> rows, parts, shifts;
};

// Subtracts what the steps before this one took from row c of A and of K.
SLIMLLM_CLONES void subtract(const Steps& steps, int64_t step, int64_t c, double* row, double* product) {
  const int64_t p = steps.p;
  for (int64_t s = 0; s < step; ++s) {
    const double* part = steps.parts.data() + s * p;
    const double* shift = steps.shifts.data() + s * p;
    const double row_of_c = steps.rows[s * p + c], part_of_c = part[c], shift_of_c = shift[c];
    for (int64_t i = 0; i < p; ++i) row[i] -= row_of_c * part[i];
    for (int64_t i = 0; i < p; ++i) product[i] -= part_of_c * shift[i] + shift_of_c * part[i];
  }
}

// Position of the least score among the free candidates; a NaN counts as the largest.
int64_t least_of(const std::vector<double>& scores, const std::vector<char>& is_free) {
  int64_t best = -1;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < static_cast<int64_t>(scores.size()); ++i) {
    if (is_free[i] && (best < 0 || scores[i] < least)) {
      best = i;
      least = scores[i] <= least ? scores[i] : std::numeric_limits<double>::infinity();
    }
  }
  return best;
}

// inverse: A, products: K, both (p, p) fp64; num: at most p; least: smallest pivot as a fraction of the largest A_cc.
// Returns the removed columns (num,) int64 and what each adds to J (num,) fp64.
std::tuple<Tensor, Tensor> greedy_elimination(const Tensor& inverse, const Tensor& products, int64_t num, double least) {
  STD_TORCH_CHECK(inverse.dim() == 2, "inverse must have two dimensions.");
  const int64_t p = inverse.size(0);
  check(inverse, "inverse", {p, p}, ScalarType::Double, inverse);
  check(products, "products", {p, p}, ScalarType::Double, inverse);
  STD_TORCH_CHECK(num >= 0 && num <= p, "num must be from 0 to the number of candidates.");
  Tensor chosen = torch::stable::new_empty(inverse, {num}, ScalarType::Long);
  Tensor costs = torch::stable::new_empty(inverse, {num}, ScalarType::Double);
  const double* a = static_cast<const double*>(inverse.const_data_ptr());
  const double* k = static_cast<const double*>(products.const_data_ptr());
  int64_t* order = static_cast<int64_t*>(chosen.mutable_data_ptr());
  double* cost = static_cast<double*>(costs.mutable_data_ptr());
  std::vector<double> pivots(p), errors(p), scores(p);
  std::vector<char> is_free(p, 1);
  double largest = 0;
  for (int64_t i = 0; i < p; ++i) {
    pivots[i] = a[i * p + i];
    errors[i] = k[i * p + i];
    largest = std::max(largest, pivots[i]);
  }
  const double floor = least * largest;
  Steps steps(num, p);
  for (int64_t step = 0; step < num; ++step) {
    for (int64_t i = 0; i < p; ++i) scores[i] = errors[i] / std::max(pivots[i], floor);
    const int64_t c = least_of(scores, is_free);
    order[step] = c;
    cost[step] = scores[c] < 0 ? 0 : scores[c];
    is_free[c] = 0;
    double* row = steps.rows.data() + step * p;
    double* part = steps.parts.data() + step * p;
    double* shift = steps.shifts.data() + step * p;
    std::copy_n(a + c * p, p, row);
    std::copy_n(k + c * p, p, shift);
    subtract(steps, step, c, row, shift);
    const double scale = 1 / std::max(pivots[c], floor), half = shift[c] / 2;
    for (int64_t i = 0; i < p; ++i) {
      part[i] = row[i] * scale;
      shift[i] -= part[i] * half;
      pivots[i] -= part[i] * row[i];
      errors[i] -= 2 * part[i] * shift[i];
    }
  }
  return {chosen, costs};
}

}  // namespace
}  // namespace slimllm

STABLE_TORCH_LIBRARY_IMPL(slimllm_C, CPU, m) { m.impl("greedy_elimination", TORCH_BOX(&slimllm::greedy_elimination)); }
