// iumad_kernels._C: importing it registers the ops (the static initialisers of csrc/torch/<op>.cpp) and it tells what was built.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../core/dispatch.h"
#include "../core/selective_scan.h"

namespace py = pybind11;
using namespace iumad;

namespace {

constexpr Isa kAllIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};

py::list supported_isas() {
  py::list names;
  for (Isa isa : kAllIsas)
    if (isa_supported(isa)) names.append(isa_name(isa));
  return names;
}

void set_cpu_isa(const std::string& name) {
  for (Isa isa : kAllIsas) {
    if (name != isa_name(isa)) continue;
    if (!isa_supported(isa)) throw std::invalid_argument("this CPU does not have the instruction set '" + name + "'");
    return set_isa(isa);
  }
  throw std::invalid_argument("unknown instruction set '" + name + "': one of " + std::string(py::str(supported_isas())));
}

py::dict build_info() {
  py::dict info;
  info["version"] = IUMAD_VERSION;
  info["compiler"] = IUMAD_COMPILER;
  info["torch_headers"] = IUMAD_TORCH_VERSION;
  info["cpu_isas_supported"] = supported_isas();
  info["cpu_isa"] = isa_name(current_isa());
  info["cuda_architectures"] = IUMAD_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of iumad_kernels.";
  m.def("build_info", &build_info, "What this binary was built from and for.");
  m.def("cpu_isa", [] { return isa_name(current_isa()); }, "The instruction set whose kernels run.");
  m.def("cpu_isas", &supported_isas, "The instruction sets compiled in that this CPU has, slowest first.");
  m.def(
      "evaluate_exponentials", [](int64_t count) { return selective_scan_kernels().exponentials(count); }, py::arg("count"),
      "Evaluates `count` exponentials as the selective scan does and nothing else: the floor its benchmark compares with.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"), "Run the kernels of another instruction set (for tests and benchmarks).");
}
