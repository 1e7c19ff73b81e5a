// slimllm_C::half_solve_ and slimllm_C::quadratic_forms on a CPU, and the path of small_lstsq for many right-hand sides. A
// group of matrices is factored in parallel, then the tiles of all of them are solved in parallel.

#include "substitution.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "clones.h"
#include "tensors.h"

namespace slimllm {
namespace {

constexpr int64_t kGroup = 64;  // factors in memory at a time

template <typename T>
struct Halves {
  using Number = T;

  const HalfProblem<T>& p;
  int64_t batch = p.batch, k = p.k, m = p.m;
  std::vector<double> squares = {};  // of every tile, so that the order of the sum does not depend on the threads

  void start(int64_t tiles) { squares.assign(p.solve ? 0 : batch * tiles, 0); }

  void finish(int64_t b, int64_t tiles) {
    const T nothing = std::numeric_limits<T>::quiet_NaN();
    if (p.solve) {
      if (p.failed[b]) std::fill_n(p.right + b * k * m, k * m, nothing);
      return;
    }
    p.forms[b] = p.failed[b] ? static_cast<double>(nothing) : 0;
    for (int64_t i = 0; i < tiles; ++i) p.forms[b] += squares[b * tiles + i];
  }

  template <typename F>
  void factorise(F& factor, int64_t b) const {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j <= i; ++j) factor.lower[i * factor.row + j] = p.matrices[(b * k + i) * k + j];
    }
    p.failed[b] = factor.factorise(0, false) ? 0 : 1;
  }

  template <typename F, typename Columns>
  void solve(const F& factor, Columns& tile, int64_t b, int64_t number, int64_t tiles) {
    const int64_t first = number * Columns::WIDTH, width = std::min<int64_t>(Columns::WIDTH, m - first);
    tile.clear();
    for (int64_t i = 0; i < k; ++i) std::copy_n(p.right + (b * k + i) * m + first, width, tile.row(i));
    const double sum = tile.forward(factor);
    if (!p.solve) squares[b * tiles + number] = sum;
    for (int64_t i = 0; i < k && p.solve; ++i) std::copy_n(tile.row(i), width, p.right + (b * k + i) * m + first);
  }
};

// Whole solutions of normal equations, in fp64.
template <typename T>
struct Wholes {
  using Number = double;

  const Problem<T>& p;
  int64_t batch = p.batch, k = p.k, m = p.m;
  std::vector<char> finite = {};  // of every tile

  void start(int64_t tiles) { finite.assign(batch * tiles, 1); }

  // A system whose solution is not finite has none.
  void finish(int64_t b, int64_t tiles) {
    bool fine = p.status[b] == 0;
    for (int64_t i = 0; i < tiles; ++i) fine = fine && finite[b * tiles + i];
    if (!fine) std::fill_n(p.solution + b * k * m, k * m, std::numeric_limits<T>::quiet_NaN());
    p.status[b] = fine ? 0 : 1;
  }

  template <typename F>
  void factorise(F& factor, int64_t b) const {
    const double ridge = p.used[b] = p.absolute_ridge(b);
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j <= i; ++j) factor.lower[i * factor.row + j] = static_cast<double>(p.gram[(b * k + i) * k + j]);
      double& diagonal = factor.lower[i * factor.row + i];
      diagonal = diagonal > 0 || diagonal < 0 ? diagonal + ridge : diagonal;
    }
    const double least = static_cast<double>(k) * std::numeric_limits<double>::epsilon();
    p.status[b] = factor.factorise(least, true) && p.makes_sense(b, ridge) ? 0 : 1;
  }

  template <typename F, typename Columns>
  void solve(const F& factor, Columns& tile, int64_t b, int64_t number, int64_t tiles) {
    const int64_t first = number * Columns::WIDTH, width = std::min<int64_t>(Columns::WIDTH, m - first);
    tile.clear();
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t c = 0; c < width; ++c) tile.row(i)[c] = static_cast<double>(p.cross[(b * k + i) * m + first + c]);
    }
    tile.forward(factor);
    tile.backward(factor);
    T nothing = 0;  // NaN as soon as a number is not finite
    for (int64_t i = 0; i < k; ++i) {
      T* to = p.solution + (b * k + i) * m + first;
      for (int64_t c = 0; c < width; ++c) {
        to[c] = static_cast<T>(tile.row(i)[c]);
        nothing += to[c] * 0;
      }
    }
    finite[b * tiles + number] = nothing == 0;
  }
};

// One instruction set: vectors of BYTES, and how its registers are used.
#define SLIMLLM_LEVEL(NAME, ATTRIBUTE, ...)                                                                         \
  struct NAME {                                                                                                     \
    using R = Registers<__VA_ARGS__>;                                                                               \
    template <typename Job, typename F>                                                                             \
    ATTRIBUTE static void factorise(const Job& job, F& factor, int64_t b) {                                         \
      job.factorise(factor, b);                                                                                     \
    }                                                                                                               \
    template <typename Job, typename F, typename Columns>                                                           \
    ATTRIBUTE static void solve(Job& job, const F& factor, Columns& tile, int64_t b, int64_t number, int64_t all) { \
      job.solve(factor, tile, b, number, all);                                                                      \
    }                                                                                                               \
  };

#if SLIMLLM_X86_LEVELS
SLIMLLM_LEVEL(V4, SLIMLLM_ONLY("x86-64-v4"), 64, 6, 4)
SLIMLLM_LEVEL(V3, SLIMLLM_ONLY("x86-64-v3"), 32, 4, 3)
#endif
SLIMLLM_LEVEL(Plain, , 16, 4, 3)

template <typename Level, typename Job>
void run_at(Job& job) {
  using T = typename Job::Number;
  using F = Factor<T, Level::R::ROWS>;
  using Columns = Tile<T, typename Level::R>;
  const auto grain = [](int64_t work) { return std::max<int64_t>(1, 100000 / (work + 1)); };  // operations per thread
  const int64_t tiles = (job.m + Columns::WIDTH - 1) / Columns::WIDTH;
  job.start(tiles);
  std::vector<F> factors(std::min(kGroup, job.batch), F(job.k));
  for (int64_t from = 0; from < job.batch; from += kGroup) {
    const int64_t count = std::min(kGroup, job.batch - from);
    torch::stable::parallel_for(0, count, grain(job.k * job.k * job.k / 3), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) Level::factorise(job, factors[i], from + i);
    });
    torch::stable::parallel_for(0, count * tiles, grain(job.k * job.k * Columns::WIDTH), [&](int64_t begin, int64_t end) {
      Columns tile(factors[0].row);
      for (int64_t i = begin; i < end; ++i) Level::solve(job, factors[i / tiles], tile, from + i / tiles, i % tiles, tiles);
    });
    for (int64_t i = 0; i < count; ++i) job.finish(from + i, tiles);
  }
}

template <typename Job>
void run(Job job) {
#if SLIMLLM_X86_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) return run_at<V4>(job);
  if (__builtin_cpu_supports("x86-64-v3")) return run_at<V3>(job);
#endif
  run_at<Plain>(job);
}

template <typename T>
void run_halves(const HalfProblem<T>& problem) {
  run(Halves<T>{problem});
}

Tensor half_solve_(const Tensor& matrices, const Tensor& right) {
  return std::get<1>(halves_on(matrices, right, true, [](const auto& problem) { run_halves(problem); }));
}

std::tuple<Tensor, Tensor> quadratic_forms(const Tensor& matrices, const Tensor& right) {
  return halves_on(matrices, right, false, [](const auto& problem) { run_halves(problem); });
}

}  // namespace

void solve_wide(const Problem<float>& problem) { run(Wholes<float>{problem}); }
void solve_wide(const Problem<double>& problem) { run(Wholes<double>{problem}); }

}  // namespace slimllm

STABLE_TORCH_LIBRARY_IMPL(slimllm_C, CPU, m) {
  m.impl("half_solve_", TORCH_BOX(&slimllm::half_solve_));
  m.impl("quadratic_forms", TORCH_BOX(&slimllm::quadratic_forms));
}
