// Greedy elimination among a few candidates, in one thread: 3/2 n² p multiply-adds for n of p candidates. No torch headers
// here.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace slimllm {

// Arguments, results and workspace. The matrices are not updated: the rows of a step follow from the original ones and from
// the steps before it. Each step has a row A_c:, a part A_c:/A_cc, and a shift, what K = V Vᵀ loses with it, of p numbers.
struct Elimination {
  Elimination(const double* inverse, const double* products, int64_t candidates, int64_t num, double least)
      : a(inverse), k(products), p(candidates), n(num), fraction(least), rows(n * p), parts(n * p), shifts(n * p),
        pivots(p), errors(p), scores(p), is_free(p, 1) {}

  const double* a;  // A, (p, p)
  const double* k;  // K, (p, p)
  int64_t p, n;
  double fraction;  // smallest pivot, as a fraction of the largest A_cc
  std::vector<double> rows, parts, shifts, pivots, errors, scores;
  std::vector<char> is_free;

  // Removes n columns; writes their positions and what each adds to J.
  void run(int64_t* order, double* cost) {
    double largest = 0;
    for (int64_t i = 0; i < p; ++i) {
      pivots[i] = a[i * p + i];
      errors[i] = k[i * p + i];
      largest = std::max(largest, pivots[i]);
    }
    const double floor = fraction * largest;
    for (int64_t step = 0; step < n; ++step) {
      for (int64_t i = 0; i < p; ++i) scores[i] = errors[i] / std::max(pivots[i], floor);
      const int64_t c = least();
      order[step] = c;
      cost[step] = scores[c] < 0 ? 0 : scores[c];
      is_free[c] = 0;
      take(step, c, std::max(pivots[c], floor));
    }
  }

  // Position of the least score among the free candidates; a NaN counts as the largest.
  int64_t least() const {
    int64_t best = -1;
    double lowest = std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < p; ++i) {
      if (is_free[i] && (best < 0 || scores[i] < lowest)) {
        best = i;
        lowest = scores[i] <= lowest ? scores[i] : std::numeric_limits<double>::infinity();
      }
    }
    return best;
  }

  void take(int64_t step, int64_t c, double pivot) {
    double* row = rows.data() + step * p;
    double* part = parts.data() + step * p;
    double* shift = shifts.data() + step * p;  // first K_c:
    std::copy_n(a + c * p, p, row);
    std::copy_n(k + c * p, p, shift);
    for (int64_t s = 0; s < step; ++s) {
      const double* old_part = parts.data() + s * p;
      const double* old_shift = shifts.data() + s * p;
      const double row_of_c = rows[s * p + c], part_of_c = old_part[c], shift_of_c = old_shift[c];
      for (int64_t i = 0; i < p; ++i) row[i] -= row_of_c * old_part[i];
      for (int64_t i = 0; i < p; ++i) shift[i] -= part_of_c * old_shift[i] + shift_of_c * old_part[i];
    }
    const double half = shift[c] / 2;
    for (int64_t i = 0; i < p; ++i) {
      part[i] = row[i] / pivot;
      shift[i] -= part[i] * half;
      pivots[i] -= part[i] * row[i];
      errors[i] -= 2 * part[i] * shift[i];
    }
  }
};

}  // namespace slimllm
