// Solver of one small system by a team of threads that share memory: a warp on a GPU, threads with a barrier in a test.
// No torch headers here.

#pragma once

#include <cmath>
#include <cstdint>

#include "problem.h"

namespace slimllm {

// Largest number of unknowns.
constexpr int kTeamUnknowns = 64;

// Largest residual, relative to √k · (right-hand side + solution), that rounding leaves in fp64.
constexpr double kAccuracy = 4 * 2.220446049250313e-16;

// Memory that a team shares for k unknowns, members in order of address. A row of the factor has an odd length, so that
// threads on one column access different banks.
struct TeamMemory {
  SLIMLLM_HOST_DEVICE TeamMemory(double* memory, int k)
      : row(k | 1),
        scale(memory),
        solution(scale + k),
        residual(solution + k),
        factor(reinterpret_cast<float*>(residual + k)),
        inverse(factor + k * row),
        forward(inverse + k),
        backward(forward + k) {}

  static SLIMLLM_HOST_DEVICE int bytes(int k) { return 3 * k * 8 + (k * (k | 1) + 3 * k) * 4; }

  int row;
  double* scale;     // S: 1 / sqrt(G_ii + λ), 0 for a column of zeros
  double* solution;  // U, solution of the scaled system: X = S U
  double* residual;  // S (R - (G + λ) S U)
  float* factor;     // L of S (G + λ) S
  float* inverse;    // 1 / L_ii
  float* forward;    // right-hand side of forward substitution, then the result of backward substitution
  float* backward;   // right-hand side of backward substitution
};

// Every thread works on the rows lane, lane + width, …; all threads take the same branches.
template <typename T, typename Team>
class TeamSolver {
 public:
  SLIMLLM_DEVICE TeamSolver(const Problem<T>& problem, int64_t system, const Team& the_team, double* memory)
      : p(problem),
        b(system),
        team(the_team),
        k(static_cast<int>(problem.k)),
        m(static_cast<int>(problem.m)),
        gram(problem.gram + system * problem.k * problem.k),
        ridge(problem.absolute_ridge(system)),
        shared(memory, k) {}

  // Solves system b and writes its solution (NaN if there is none), the ridge used, and its status.
  SLIMLLM_DEVICE void solve() {
    bool fine = p.makes_sense(b, ridge);
    fine = factorise() && fine;
    for (int c = 0; c < m && fine; ++c) fine = solve_column(c);
    if (!fine) {
      for (int64_t i = team.lane(); i < p.k * p.m; i += team.width()) p.solution[b * p.k * p.m + i] = static_cast<T>(NAN);
    }
    if (team.lane() == 0) {
      p.used[b] = ridge;
      p.status[b] = fine ? 0 : 1;
    }
  }

 private:
  SLIMLLM_DEVICE double element(int i, int j) const {
    return static_cast<double>(i >= j ? gram[i * k + j] : gram[j * k + i]);
  }

  // Factors S (G + λ) S = L Lᵀ in fp32, by columns; returns false if a pivot is lost in rounding.
  SLIMLLM_DEVICE bool factorise() {
    for (int i = team.lane(); i < k; i += team.width()) {
      const double diagonal = static_cast<double>(gram[i * k + i]);
      shared.scale[i] = diagonal > 0 ? 1 / sqrt(diagonal + ridge) : 0;
    }
    team.sync();
    for (int i = 0; i < k; ++i) {
      for (int j = team.lane(); j < i; j += team.width()) {
        shared.factor[i * shared.row + j] =
            static_cast<float>(static_cast<double>(gram[i * k + j]) * shared.scale[i] * shared.scale[j]);
      }
    }
    for (int i = team.lane(); i < k; i += team.width()) shared.factor[i * shared.row + i] = 1;
    bool regular = true;
    for (int j = 0; j < k; ++j) {
      team.sync();
      const float pivot = shared.factor[j * shared.row + j];
      regular = regular && pivot > static_cast<float>(k) * 1.1920929e-7f;
      const float inverse = 1 / sqrtf(pivot > 0 ? pivot : 1);
      for (int i = j + 1 + team.lane(); i < k; i += team.width()) shared.factor[i * shared.row + j] *= inverse;
      if (team.lane() == 0) shared.inverse[j] = inverse;
      team.sync();
      for (int i = first_row_after(j); i < k; i += team.width()) {
        float* row = shared.factor + i * shared.row;
        for (int r = j + 1; r <= i; ++r) row[r] -= row[j] * shared.factor[r * shared.row + j];
      }
    }
    return regular;
  }

  // Solves column c of X by refinement in fp64; returns false if it does not converge or leaves the range of T.
  SLIMLLM_DEVICE bool solve_column(int c) {
    for (int i = team.lane(); i < k; i += team.width()) {
      shared.residual[i] = shared.scale[i] * static_cast<double>(p.cross[(b * k + i) * m + c]);
      shared.solution[i] = 0;
    }
    team.sync();
    const double right_size = largest(shared.residual);
    double missing = right_size;
    for (int step = 0; step < 10 && !converged(missing, right_size); ++step) {
      correct(missing);
      team.sync();
      update_residual(c);
      team.sync();
      missing = largest(shared.residual);
    }
    bool fine = converged(missing, right_size);
    for (int i = 0; i < k; ++i) fine = fine && std::isfinite(value(i));
    for (int i = team.lane(); i < k; i += team.width()) p.solution[(b * k + i) * m + c] = value(i);
    team.sync();
    return fine;
  }

  // Whether the residual `missing` is down to rounding, for a right-hand side of size `given`.
  SLIMLLM_DEVICE bool converged(double missing, double given) const {
    const double size = largest(shared.solution) + given;
    return std::isfinite(missing) && missing <= sqrt(static_cast<double>(k)) * kAccuracy * size;
  }

  // Adds (L Lᵀ)⁻¹ residual to U; `size` is the residual's largest element.
  SLIMLLM_DEVICE void correct(double size) {
    const double inverse_size = 1 / size;
    for (int i = team.lane(); i < k; i += team.width()) {
      shared.forward[i] = static_cast<float>(shared.residual[i] * inverse_size);
    }
    for (int j = 0; j < k; ++j) {
      team.sync();
      const float y = shared.forward[j] * shared.inverse[j];
      if (team.lane() == 0) shared.backward[j] = y;
      for (int i = first_row_after(j); i < k; i += team.width()) {
        shared.forward[i] -= shared.factor[i * shared.row + j] * y;
      }
    }
    for (int j = k - 1; j >= 0; --j) {
      team.sync();
      const float y = shared.backward[j] * shared.inverse[j];
      if (team.lane() == 0) shared.forward[j] = y;
      for (int i = team.lane(); i < j; i += team.width()) shared.backward[i] -= shared.factor[j * shared.row + i] * y;
    }
    team.sync();
    for (int i = team.lane(); i < k; i += team.width()) shared.solution[i] += size * static_cast<double>(shared.forward[i]);
  }

  SLIMLLM_DEVICE void update_residual(int c) {
    for (int i = team.lane(); i < k; i += team.width()) {
      double sum = static_cast<double>(p.cross[(b * k + i) * m + c]) - ridge * shared.scale[i] * shared.solution[i];
      for (int j = 0; j < k; ++j) {
        sum -= element(i, j) * (shared.scale[j] * shared.solution[j]);
      }
      shared.residual[i] = shared.scale[i] * sum;
    }
  }

  SLIMLLM_DEVICE T value(int i) const { return static_cast<T>(shared.scale[i] * shared.solution[i]); }

  // Largest absolute value of k numbers; NaN if one is not finite.
  SLIMLLM_DEVICE double largest(const double* numbers) const {
    double size = 0, nothing = 0;
    for (int i = 0; i < k; ++i) {
      size = fmax(size, fabs(numbers[i]));
      nothing += numbers[i] - numbers[i];
    }
    return size + nothing;
  }

  SLIMLLM_DEVICE int first_row_after(int j) const { return j + 1 + team.lane(); }

  const Problem<T>& p;
  const int64_t b;
  const Team& team;
  const int k, m;
  const T* gram;
  const double ridge;
  TeamMemory shared;
};

}  // namespace slimllm
