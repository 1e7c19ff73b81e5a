// The solver of csrc/panels.h with threads and a barrier in place of a block of a GPU. Arguments: threads, float or double,
// batch, k, m. Standard input: matrices, right. Standard output: L⁻¹ R, the sums of its squares (fp64), failed (int32).

#include <cstdlib>
#include <string>
#include <vector>

#include "../csrc/panels.h"
#include "on_host.h"

namespace {

template <typename T>
void run(int threads, int64_t batch, int64_t k, int64_t m) {
  using Factor = slimllm::PanelFactor<T, Threads>;
  using Tile = slimllm::PanelTile<T, Threads>;
  const int size = static_cast<int>(k);
  const auto matrices = read<T>(batch * k * k), right = read<T>(batch * k * m);
  std::vector<T> factors(batch * k * slimllm::padded(size), T(1e30)), solution = right;
  std::vector<double> parts(batch * threads), forms(batch);
  std::vector<int32_t> failed(batch, 7);
  // Exactly as much as a kernel is given, so that a sanitizer sees what goes beyond it.
  std::vector<T> panel(Factor::numbers(size), T(1e30)), columns(Tile::numbers(size), T(1e30));
  run_team(threads, [&](const Threads& self) {
    for (int64_t b = 0; b < batch; ++b) {
      T* factor = factors.data() + b * k * slimllm::padded(size);
      const bool regular = Factor::run(matrices.data() + b * k * k, factor, size, panel.data(), self);
      if (self.index == 0) failed[b] = regular ? 0 : 1;
      for (int64_t first = 0; first < m; first += Tile::kWidth) {
        Tile tile(factor, size, columns.data(), self);
        parts[b * threads + self.index] += tile.run(solution.data() + b * k * m, true, m, first);
        self.sync();
      }
    }
  });
  for (int64_t b = 0; b < batch; ++b) {
    for (int index = 0; index < threads; ++index) forms[b] += parts[b * threads + index];
  }
  write(solution);
  write(forms);
  write(failed);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 6) return 2;
  const auto number = [&](int i) { return std::atoll(arguments[i]); };
  const auto solve = arguments[2] == std::string("float") ? run<float> : run<double>;
  solve(static_cast<int>(number(1)), number(3), number(4), number(5));
  return 0;
}
