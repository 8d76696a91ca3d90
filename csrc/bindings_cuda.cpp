#include "bindings.h"
#include "channel_aggregation_ffn_cuda.h"
#include "dwconv_cuda.h"
#include "global_filter_cuda.h"
#include "toolchain.h"

namespace vops {

void prepare() {}
void raise(Error error) { throw std::runtime_error(std::string("CUDA: ") + error); }

// The last two arguments of every kernel: the device's index and its stream.
static void read(Arguments& given, CudaTarget* target) {
  read(given, &target->device);
  read(given, &target->stream);
}

namespace {

template <class T>
using Branches = std::array<T, 3>;

// (What the driver supports, what the kernels need), as 1000 * major + 10 * minor; no driver: 0.
std::pair<int, int> versions() {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return {driver, runtime};
}

void define_multi_order_dwconv(PyObject* m) {
  define(
      m, "multi_order_dwconv",
      +[](Tensor4 x, Branches<Tensor4> w, Branches<Tensor4> b, Tensor4 y, Branches<DwConv> convs, Tensor4 x0,
          CudaTarget target) { return multi_order_dwconv_cuda(x, multi_order(convs, w, b), y, x0, target); });
  define(
      m, "multi_order_dwconv_backward_workspace",
      +[](Tensor4 dy, Branches<Tensor4> w, Branches<Tensor4> b, Branches<DwConv> convs) {
        return multi_order_dwconv_backward_workspace(dy, multi_order(convs, w, b));
      });
  define(
      m, "multi_order_dwconv_backward",
      +[](Tensor4 dy, Tensor4 x, Branches<Tensor4> w, Branches<Tensor4> b, Tensor4 dx, Branches<Tensor4> dw,
          Branches<Tensor4> db, Branches<DwConv> convs, Tensor4 x0, Tensor4 dx0, void* room, CudaTarget target) {
        const MultiOrderDwConvGrads grads = {dx, {dw[0], dw[1], dw[2]}, {db[0], db[1], db[2]}};
        return multi_order_dwconv_backward_cuda(dy, x, multi_order(convs, w, b), grads, x0, dx0, room, target);
      });
}

void define_channel_aggregation(PyObject* m) {
  define(m, "has_aggregation_kernel", &has_aggregation_kernel);
  define(m, "channel_aggregation_workspace", &channel_aggregation_workspace);
  define(
      m, "channel_aggregation",
      +[](Tensor4 f, Tensor4 w, Tensor4 b, Tensor4 decompose, Tensor4 decompose_bias, Tensor4 h, Tensor4 d,
          Tensor4 scores, void* room, CudaTarget target) {
        return channel_aggregation_cuda(f, {w, b, decompose, decompose_bias}, h, d, scores, room, target);
      });
  define(m, "channel_aggregation_backward_workspace", &channel_aggregation_backward_workspace);
  define(
      m, "channel_aggregation_backward",
      +[](Tensor4 f, Tensor4 w, Tensor4 b, Tensor4 decompose, Tensor4 dscores, Tensor4 h, Tensor4 dh, void* room,
          CudaTarget target) {
        return channel_aggregation_backward_cuda(f, {w, b, decompose, {}}, dscores, h, dh, room, target);
      });
  define(m, "channel_aggregation_backward_input", &channel_aggregation_backward_input_cuda);
}

#ifdef VOPS_EMU
// Since the last call, a launch a line: threads, blocks, bytes of shared memory, the three numbers of VOPS_COST,
// kernel.
std::string recorded() {
  std::string text;
  for (const emu::Launch& l : emu::state().recorded) {
    const int64_t blocks = int64_t(l.grid.x) * l.grid.y * l.grid.z, threads = l.threads, shared = l.shared;
    for (int64_t n : {threads, blocks, shared, l.cost.bytes_read, l.cost.bytes_written, l.cost.multiply_adds}) {
      text += std::to_string(n) + ' ';
    }
    text += l.kernel + std::string("\n");
  }
  emu::state().recorded.clear();
  return text;
}
#endif

void fill(PyObject* m) {
#ifdef VOPS_EMU
  define(m, "record", +[](bool on) { return emu::state().recording = on; });
  define(m, "recorded", &recorded);
#endif
  define(m, "versions", &versions);
  define(m, "has_march_kernel", &has_march_kernel);
  define(m, "dwconv", &dwconv_cuda);
  define(m, "dwconv_backward_activation", &dwconv_backward_activation_cuda);
  define(m, "dwconv_backward_input", &dwconv_backward_input_cuda);
  define(m, "dwconv_backward_weight_workspace", &dwconv_backward_weight_workspace);
  define(m, "dwconv_backward_weight", &dwconv_backward_weight_cuda);
  define_multi_order_dwconv(m);
  define_channel_aggregation(m);
  define(m, "has_filter_kernel", &has_filter_kernel);
  define(m, "global_filter", &global_filter_cuda);
  define(m, "global_filter_backward_workspace", &global_filter_backward_workspace);
  define(m, "global_filter_backward", &global_filter_backward_cuda);
}

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace vops

PyMODINIT_FUNC PyInit__cuda() { return vops::make_module(&vops::module, vops::fill); }
