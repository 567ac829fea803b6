// iumad_kernels._C: importing it registers the ops (the static initialisers of csrc/torch/<op>.cpp) and it tells what was built.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../core/dispatch.h"
#include "../core/selective_scan.h"
#include "common.h"

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

constexpr Bf16 kAllBf16[] = {Bf16::kNone, Bf16::kAvx512, Bf16::kAmx};

py::list supported_bf16() {
  py::list names;
  for (Bf16 unit : kAllBf16)
    if (bf16_supported(unit)) names.append(bf16_name(unit));
  return names;
}

void set_cpu_bf16(const std::string& name) {
  for (Bf16 unit : kAllBf16) {
    if (name != bf16_name(unit)) continue;
    if (!bf16_supported(unit)) throw std::invalid_argument("this CPU does not have the bfloat16 matrix unit '" + name + "'");
    return set_bf16(unit);
  }
  throw std::invalid_argument("unknown bfloat16 matrix unit '" + name + "': one of " + std::string(py::str(supported_bf16())));
}

py::dict build_info() {
  py::dict info;
  info["version"] = IUMAD_VERSION;
  info["compiler"] = IUMAD_COMPILER;
  info["torch_headers"] = IUMAD_TORCH_VERSION;
  info["cpu_isas_supported"] = supported_isas();
  info["cpu_isa"] = isa_name(current_isa());
  info["cpu_bf16"] = bf16_name(current_bf16());
  info["emulated"] = isa_emulated();
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
  m.def(
      "fill_new_tensors", [](bool fill) { fill_new_tensors = fill; }, py::arg("fill"),
      "Fill the memory of results with NaN before kernels write it (for tests).");
  m.def("cpu_bf16", [] { return bf16_name(current_bf16()); }, "The instructions that multiply bfloat16 matrices.");
  m.def("cpu_bf16_units", &supported_bf16, "Those compiled in that this CPU has, slowest first.");
  m.def("set_cpu_bf16", &set_cpu_bf16, py::arg("name"),
        "Multiply bfloat16 matrices by other instructions while the instruction set is avx512 (for tests and benchmarks).");
}
