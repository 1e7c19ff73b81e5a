// The solver of csrc/team.h with threads and a barrier in place of a warp, so that it runs, under a sanitizer too, where
// there is no GPU. Arguments: threads, float or double, batch, k, m, absolute (0 or 1). Standard input: gram, cross,
// ridge (fp64). Standard output: solution, used (fp64), status (int32).

#include <cstdlib>
#include <string>
#include <vector>

#include "../csrc/team.h"
#include "on_host.h"

namespace {

template <typename T>
void run(int threads, int64_t batch, int64_t k, int64_t m, bool absolute) {
  const auto gram = read<T>(batch * k * k), cross = read<T>(batch * k * m);
  const auto ridge = read<double>(batch);
  std::vector<T> solution(batch * k * m);
  std::vector<double> used(batch);
  std::vector<int32_t> status(batch, 7);
  const slimllm::Problem<T> problem{gram.data(), cross.data(), ridge.data(), solution.data(), used.data(),
                                    status.data(), batch, k, m, absolute};
  // Exactly as much as a kernel is given, so that a sanitizer sees what goes beyond it.
  const size_t bytes = slimllm::TeamMemory::bytes(static_cast<int>(k));
  std::vector<double> memory((bytes + 7) / 8, 1e300);
  run_team(threads, [&](const Threads& self) {
    for (int64_t b = 0; b < batch; ++b) {
      slimllm::TeamSolver<T, Threads>(problem, b, self, memory.data()).solve();
      self.sync();
    }
  });
  write(solution);
  write(used);
  write(status);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 7) return 2;
  const auto number = [&](int i) { return std::atoll(arguments[i]); };
  const auto solve = arguments[2] == std::string("float") ? run<float> : run<double>;
  solve(static_cast<int>(number(1)), number(3), number(4), number(5), number(6) != 0);
  return 0;
}
