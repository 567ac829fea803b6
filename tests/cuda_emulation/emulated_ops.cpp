// torch.ops.iumad_emulated: the CUDA bindings and kernels of this library, run by the emulator on CPU tensors.
#include "../../csrc/torch/selective_scan_cuda.cpp"
#include "emulator.h"

// What the bindings ask of a CUDA torch.
extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
}

namespace iumad {
namespace {

const bool shows_what_no_kernel_writes = (fill_new_tensors = true);

void set_order(int64_t order) { emulation::order = static_cast<emulation::Order>(order); }

}  // namespace

STABLE_TORCH_LIBRARY(iumad_emulated, m) {
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "Tensor? initial_state, int scheme, int step, bool delta_softplus, bool save_states, bool want_last_state=True) "
      "-> (Tensor out, Tensor last_state, Tensor tile_states)");
  m.def(
      "selective_scan_backward(Tensor grad_out, Tensor? grad_last_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? delta_bias, Tensor tile_states, int scheme, int step, bool delta_softplus, "
      "bool has_initial_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, bool delta_softplus) -> Tensor");
  m.def("set_order(int order) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(iumad_emulated, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&forward));
  m.impl("selective_scan_backward", TORCH_BOX(&backward));
  m.impl("selective_state_update", TORCH_BOX(&update));
}

STABLE_TORCH_LIBRARY_IMPL(iumad_emulated, CompositeExplicitAutograd, m) { m.impl("set_order", TORCH_BOX(&set_order)); }

}  // namespace iumad
