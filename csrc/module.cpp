// The extension module slimllm._C. It holds what needs no torch headers, so that it builds in seconds with any C++17
// compiler and does not depend on the version of torch.

#include <pybind11/pybind11.h>

#include <string>

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
        return info;
      },
      "How this module was built: compiler and cpp_standard (the value of __cplusplus).");
}
