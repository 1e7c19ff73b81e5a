// csrc/substitution.h with the vectors of every instruction set, whatever this machine has. Arguments: bytes of a vector
// (64, 32, 16), float or double, k, m. Standard input: a matrix, and right-hand sides. Standard output: L⁻¹ R, (L Lᵀ)⁻¹ R,
// and the sum of the squares of the former (fp64).

#include <cstdlib>
#include <string>
#include <vector>

#include "../csrc/substitution.h"
#include "on_host.h"

namespace {

template <typename T, typename R>
void run(int64_t k, int64_t m) {
  using Tile = slimllm::Tile<T, R>;
  const auto matrix = read<T>(k * k), right = read<T>(k * m);
  slimllm::Factor<T, R::ROWS> factor(k);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j <= i; ++j) factor.lower[i * factor.row + j] = matrix[i * k + j];
  }
  if (!factor.factorise(0, false)) std::exit(4);
  std::vector<T> half(k * m), whole(k * m);
  std::vector<double> squares(1);
  for (int64_t first = 0; first < m; first += Tile::WIDTH) {
    const int64_t width = std::min<int64_t>(Tile::WIDTH, m - first);
    Tile tile(factor.row);
    for (int64_t i = 0; i < k; ++i) std::copy_n(right.data() + i * m + first, width, tile.row(i));
    squares[0] += tile.forward(factor);
    for (int64_t i = 0; i < k; ++i) std::copy_n(tile.row(i), width, half.data() + i * m + first);
    tile.backward(factor);
    for (int64_t i = 0; i < k; ++i) std::copy_n(tile.row(i), width, whole.data() + i * m + first);
  }
  write(half);
  write(whole);
  write(squares);
}

template <typename T>
void choose(int bytes, int64_t k, int64_t m) {
  if (bytes == 64) return run<T, slimllm::Registers<64, 6, 4>>(k, m);
  if (bytes == 32) return run<T, slimllm::Registers<32, 4, 3>>(k, m);
  run<T, slimllm::Registers<16, 4, 3>>(k, m);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const auto number = [&](int i) { return std::atoll(arguments[i]); };
  const auto solve = arguments[2] == std::string("float") ? choose<float> : choose<double>;
  solve(static_cast<int>(number(1)), number(3), number(4));
  return 0;
}
