// The extension module slimllm._C, which reports how it was built. Importing it registers the operators of the other files.
// No torch headers here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#ifndef SLIMLLM_CUDA_ARCHITECTURES
#define SLIMLLM_CUDA_ARCHITECTURES ""
#define SLIMLLM_CUDA ""
#endif
#ifndef SLIMLLM_WITHOUT_CUDA
#define SLIMLLM_WITHOUT_CUDA ""
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

// Splits a list that setup.py passes as `a;b`.
std::vector<std::string> words(const std::string& list) {
  std::vector<std::string> found;
  std::istringstream stream(list);
  for (std::string word; std::getline(stream, word, ';');) found.push_back(word);
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled part of slimllm.";
  module.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = compiler();
        info["cpp_standard"] = static_cast<long>(__cplusplus);
        info["cuda"] = SLIMLLM_CUDA;
        info["cuda_architectures"] = words(SLIMLLM_CUDA_ARCHITECTURES);
        info["without_cuda"] = SLIMLLM_WITHOUT_CUDA;
        info["operations"] = std::vector<std::string>{"lstsq", "greedy_elimination",
                                                           "half_solve_", "quadratic_forms"};
        return info;
      },
      "How this module was built: compiler, cpp_standard (the value of __cplusplus), cuda (its version, empty "
      "without), cuda_architectures (as in TORCH_CUDA_ARCH_LIST), without_cuda (why there is no CUDA part) and operations.");
}
