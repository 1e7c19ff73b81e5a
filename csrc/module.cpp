// The extension module slimllm._C: how it was built. Importing it also registers the operators of the other files.
// No torch headers here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled part of slimllm.";
  module.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = compiler();
        info["cpp_standard"] = static_cast<long>(__cplusplus);
        info["operations"] = std::vector<std::string>{"lstsq (CPU)"};
        return info;
      },
      "How this module was built: compiler, cpp_standard (the value of __cplusplus), and operations by device.");
}
