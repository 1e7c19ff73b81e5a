// slimllm_C::small_lstsq on a CPU: many small least-squares problems from their normal equations, LANES at a time, and
// parallel over the batch. Written against torch's stable ABI, so that one build runs on several versions of torch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>

#include "lanes.h"

// The innermost loops run over lanes; a clone of the function for each vector length lets them use what the processor has.
// It takes GCC 12, whose names for the processors these are, and a C library that chooses functions at load time.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SLIMLLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define SLIMLLM_CLONES
#endif

namespace slimllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLanes = 8;

// All arrays are contiguous; `start` may be null.
template <typename T>
struct Problem {
  const T* gram;
  const T* cross;
  const T* start;
  const double* ridge;
  T* solution;
  double* used;
  int64_t k, m;
  bool absolute;
};

// Systems first … first + count - 1 in the lanes; the lanes beyond hold the first one again.
template <typename T, int LANES>
inline void load(const Problem<T>& p, Lanes<LANES>& lanes, int64_t first, int64_t count) {
  const int64_t k = p.k, m = p.m;
  for (int lane = 0; lane < LANES; ++lane) {
    const int64_t b = first + (lane < count ? lane : 0);
    const T* g = p.gram + b * k * k;
    const T* r = p.cross + b * k * m;
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j <= i; ++j) lanes.gram[(i * k + j) * LANES + lane] = static_cast<double>(g[i * k + j]);
    }
    for (int64_t i = 0; i < k * m; ++i) lanes.right[i * LANES + lane] = static_cast<double>(r[i]);
    if (p.start != nullptr) {  // solve for the difference from the start: R - G W₀
      const T* w = p.start + b * k * m;
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j < k; ++j) {
          const double value = lanes.gram[(i >= j ? i * k + j : j * k + i) * LANES + lane];
          for (int64_t c = 0; c < m; ++c) {
            lanes.right[(i * m + c) * LANES + lane] -= value * static_cast<double>(w[j * m + c]);
          }
        }
      }
    }
    double mean = 0;
    for (int64_t i = 0; i < k; ++i) mean += lanes.gram[(i * k + i) * LANES + lane] / static_cast<double>(k);
    lanes.ridge[lane] = p.absolute ? p.ridge[b] : p.ridge[b] * mean;
  }
}

template <typename T, int LANES>
inline void store(const Problem<T>& p, const Lanes<LANES>& lanes, int lane, int64_t b) {
  for (int64_t i = 0; i < p.k * p.m; ++i) {
    const double from = p.start != nullptr ? static_cast<double>(p.start[b * p.k * p.m + i]) : 0;
    p.solution[b * p.k * p.m + i] = static_cast<T>(from + lanes.right[i * LANES + lane]);
  }
  p.used[b] = lanes.ridge[lane];
}

// One system, with the least of the ridges that makes it regular; NaN where none does.
template <typename T>
void solve_alone(const Problem<T>& p, Lanes<1>& lanes, int64_t b) {
  load(p, lanes, b, 1);
  double mean = 0;
  for (int64_t i = 0; i < p.k; ++i) mean += lanes.gram[i * p.k + i] / static_cast<double>(p.k);
  const double wanted = lanes.ridge[0];
  lanes.factorise();
  for (double raised = kFirstRidge; lanes.singular(0) && raised <= kLastRidge * 1.001; raised *= kRidgeStep) {
    lanes.ridge[0] = std::max(wanted, raised * mean);
    lanes.factorise();
  }
  if (lanes.singular(0)) {
    std::fill(lanes.right.begin(), lanes.right.end(), std::numeric_limits<double>::quiet_NaN());
    lanes.ridge[0] = std::numeric_limits<double>::quiet_NaN();
  } else {
    lanes.solve();
  }
  store(p, lanes, 0, b);
}

SLIMLLM_CLONES void factorise_and_solve(Lanes<kLanes>& lanes) {
  lanes.factorise();
  lanes.solve();
}

template <typename T>
void solve_range(const Problem<T>& p, int64_t begin, int64_t end) {
  Lanes<kLanes> lanes(p.k, p.m);
  std::optional<Lanes<1>> alone;
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - first);
    load(p, lanes, first, count);
    factorise_and_solve(lanes);
    for (int lane = 0; lane < count; ++lane) {
      if (!lanes.singular(lane)) {
        store(p, lanes, lane, first + lane);
        continue;
      }
      if (!alone) alone.emplace(p.k, p.m);
      solve_alone(p, *alone, first + lane);
    }
  }
}

void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const auto found = tensor.sizes();
  STD_TORCH_CHECK(found.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), found.begin()), name,
                  " has the wrong shape.");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype.");
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name, " must be contiguous and on the CPU.");
}

template <typename T>
void run(const Tensor& gram, const Tensor& cross, const Tensor& ridge, bool absolute, const std::optional<Tensor>& start,
         Tensor& solution, Tensor& used) {
  const int64_t batch = gram.size(0), k = gram.size(1), m = cross.size(2);
  const Problem<T> problem{
      static_cast<const T*>(gram.const_data_ptr()),
      static_cast<const T*>(cross.const_data_ptr()),
      start ? static_cast<const T*>(start->const_data_ptr()) : nullptr,
      static_cast<const double*>(ridge.const_data_ptr()),
      static_cast<T*>(solution.mutable_data_ptr()),
      static_cast<double*>(used.mutable_data_ptr()),
      k,
      m,
      absolute,
  };
  // Whole groups of lanes, and at least some 100 000 operations for a thread.
  const int64_t groups = (batch + kLanes - 1) / kLanes;
  const int64_t work = kLanes * (k * k * k / 3 + 2 * k * k * m + 1);
  torch::stable::parallel_for(0, groups, std::max<int64_t>(1, 100000 / work), [&](int64_t begin, int64_t end) {
    solve_range(problem, begin * kLanes, std::min(end * kLanes, batch));
  });
}

// gram (B, K, K), cross and start (B, K, M), of one dtype, fp32 or fp64; ridge (B,) fp64, relative to the mean of the
// diagonal unless `absolute`. Returns the solution (B, K, M) and the ridge used (B,) fp64, absolute, NaN where a system is
// not positive semidefinite. Arguments are checked for their meaning in Python (slimllm.ops.lstsq).
std::tuple<Tensor, Tensor> small_lstsq(const Tensor& gram, const Tensor& cross, const Tensor& ridge, bool absolute,
                                       std::optional<Tensor> start) {
  STD_TORCH_CHECK(gram.dim() == 3 && cross.dim() == 3, "gram and cross must have three dimensions.");
  const int64_t batch = gram.size(0), k = gram.size(1), m = cross.size(2);
  const ScalarType dtype = gram.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "gram must be float32 or float64.");
  check(gram, "gram", {batch, k, k}, dtype);
  check(cross, "cross", {batch, k, m}, dtype);
  check(ridge, "ridge", {batch}, ScalarType::Double);
  if (start) check(*start, "start", {batch, k, m}, dtype);
  Tensor solution = torch::stable::empty_like(cross);
  Tensor used = torch::stable::empty_like(ridge);
  if (dtype == ScalarType::Float) {
    run<float>(gram, cross, ridge, absolute, start, solution, used);
  } else {
    run<double>(gram, cross, ridge, absolute, start, solution, used);
  }
  return {solution, used};
}

}  // namespace
}  // namespace slimllm

STABLE_TORCH_LIBRARY(slimllm_C, m) {
  m.def("small_lstsq(Tensor gram, Tensor cross, Tensor ridge, bool absolute, Tensor? start) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(slimllm_C, CPU, m) { m.impl("small_lstsq", TORCH_BOX(&slimllm::small_lstsq)); }
