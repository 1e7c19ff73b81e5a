// slimllm_C::small_lstsq on a CPU: least-squares problems from their normal equations. Many small ones with few right-hand
// sides are solved LANES at a time and in parallel over the batch, all others by substitution.h. Uses only torch's stable
// ABI, so that one build runs on several versions of torch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#include "clones.h"
#include "lanes.h"
#include "problem.h"
#include "substitution.h"
#include "tensors.h"

namespace slimllm {
namespace {

using torch::stable::Tensor;

constexpr int kLanes = 8;
// Systems whose lanes fit a core's caches, if most lanes are used.
constexpr int64_t kLaneUnknowns = 128, kLaneColumns = 16, kFewLanes = 6, kFewUnknowns = 32;

// Loads systems first … first + count - 1 into the lanes; spare lanes hold the first system again.
template <typename T>
void load(const Problem<T>& p, Lanes<kLanes>& lanes, int64_t first, int64_t count) {
  const int64_t k = p.k, m = p.m;
  const T* grams[kLanes];
  const T* crosses[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t b = first + (lane < count ? lane : 0);
    grams[lane] = p.gram + b * k * k;
    crosses[lane] = p.cross + b * k * m;
  }
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double* to = lanes.system.data() + (i * k + j) * kLanes;
      for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<double>(grams[lane][i * k + j]);
    }
  }
  for (int64_t i = 0; i < k * m; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) lanes.right[i * kLanes + lane] = static_cast<double>(crosses[lane][i]);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t b = first + (lane < count ? lane : 0);
    lanes.ridge[lane] = p.absolute_ridge(b);
  }
}

// Stores the solution of system b from its lane, or NaN if there is none.
template <typename T>
void store(const Problem<T>& p, const Lanes<kLanes>& lanes, int lane, int64_t b) {
  bool fine = lanes.regular[lane] && p.makes_sense(b, lanes.ridge[lane]);
  for (int64_t i = 0; i < p.k * p.m; ++i) {
    const T value = static_cast<T>(lanes.right[i * kLanes + lane]);
    p.solution[b * p.k * p.m + i] = value;
    fine = fine && std::isfinite(value);
  }
  if (!fine) std::fill_n(p.solution + b * p.k * p.m, p.k * p.m, std::numeric_limits<T>::quiet_NaN());
  p.used[b] = lanes.ridge[lane];
  p.status[b] = fine ? 0 : 1;
}

// The innermost loops run over lanes.
SLIMLLM_CLONES void factorise_and_solve(Lanes<kLanes>& lanes) {
  lanes.factorise();
  lanes.solve();
}

template <typename T>
void run(const Problem<T>& problem) {
  // Whole groups of lanes, and at least about 100 000 operations per thread.
  const int64_t k = problem.k, m = problem.m, batch = problem.batch;
  const int64_t groups = (batch + kLanes - 1) / kLanes;
  const int64_t work = kLanes * (k * k * k / 3 + 2 * k * k * m + 1);
  torch::stable::parallel_for(0, groups, std::max<int64_t>(1, 100000 / work), [&](int64_t begin, int64_t end) {
    Lanes<kLanes> lanes(k, m);
    for (int64_t first = begin * kLanes; first < std::min(end * kLanes, batch); first += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, batch - first);
      load(problem, lanes, first, count);
      factorise_and_solve(lanes);
      for (int lane = 0; lane < count; ++lane) store(problem, lanes, lane, first + lane);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> small_lstsq(const Tensor& gram, const Tensor& cross, const Tensor& ridge, bool absolute) {
  return small_lstsq_on(gram, cross, ridge, absolute, [](const auto& problem) {
    const bool many = problem.batch >= kFewLanes || problem.k <= kFewUnknowns;
    if (many && problem.k <= kLaneUnknowns && problem.m <= kLaneColumns) {
      run(problem);
    } else {
      solve_wide(problem);
    }
  });
}

}  // namespace
}  // namespace slimllm

STABLE_TORCH_LIBRARY(slimllm_C, m) {
  m.def("small_lstsq(Tensor gram, Tensor cross, Tensor ridge, bool absolute) -> (Tensor, Tensor, Tensor)");
  m.def("greedy_elimination(Tensor inverse, Tensor products, int num, float least) -> (Tensor, Tensor)");
  m.def("half_solve_(Tensor matrices, Tensor(a!) right) -> Tensor");
  m.def("quadratic_forms(Tensor matrices, Tensor right) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(slimllm_C, CPU, m) { m.impl("small_lstsq", TORCH_BOX(&slimllm::small_lstsq)); }
