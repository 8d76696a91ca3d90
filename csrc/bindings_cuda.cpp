#include "bindings.h"
#include "dwconv_cuda.h"
#include "global_filter_cuda.h"
#include "toolchain.h"

using namespace vops;

namespace {

// The last two arguments of every kernel: the device's index and its stream.
template <class F>
void run(const F& f) {
  if (const Error error = without_gil(f)) throw std::runtime_error(std::string("CUDA: ") + error);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("has_march_kernel", [](int dtype, const py::tuple& f) { return has_march_kernel(dtype, conv(f)); });
  // (what the driver supports, what the kernels need), as 1000 * major + 10 * minor; no driver: 0.
  m.def("versions", [] {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    return std::make_pair(driver, runtime);
  });

  m.def("dwconv", [](py::handle x, py::handle w, py::handle b, py::handle y, const py::tuple& f, int activation,
                     int device, uintptr_t stream) {
    const Tensor4 tx = tensor(x), tw = tensor(w), tb = tensor(b), ty = tensor(y);
    const DwConv c = conv(f);
    const CudaTarget target = {device, reinterpret_cast<void*>(stream)};
    run([&] { return dwconv_cuda(tx, tw, tb, ty, c, Activation(activation), target); });
  });
  m.def("dwconv_backward_activation", [](py::handle dy, py::handle x, py::handle w, py::handle b, py::handle du,
                                         const py::tuple& f, int activation, int device, uintptr_t stream) {
    const Tensor4 tdy = tensor(dy), tx = tensor(x), tw = tensor(w), tb = tensor(b), tdu = tensor(du);
    const DwConv c = conv(f);
    const CudaTarget target = {device, reinterpret_cast<void*>(stream)};
    run([&] { return dwconv_backward_activation_cuda(tdy, tx, tw, tb, tdu, c, Activation(activation), target); });
  });
  m.def("dwconv_backward_input",
        [](py::handle dy, py::handle w, py::handle dx, const py::tuple& f, int device, uintptr_t stream) {
          const Tensor4 tdy = tensor(dy), tw = tensor(w), tdx = tensor(dx);
          const DwConv c = conv(f);
          const CudaTarget target = {device, reinterpret_cast<void*>(stream)};
          run([&] { return dwconv_backward_input_cuda(tdy, tw, tdx, c, target); });
        });
  m.def("dwconv_backward_weight_workspace",
        [](py::handle dy, const py::tuple& f) { return dwconv_backward_weight_workspace(tensor(dy), conv(f)); });
  m.def("dwconv_backward_weight", [](py::handle dy, py::handle x, py::handle dw, py::handle db, const py::tuple& f,
                                     uintptr_t workspace, int device, uintptr_t stream) {
    const Tensor4 tdy = tensor(dy), tx = tensor(x), tdw = tensor(dw), tdb = tensor(db);
    const DwConv c = conv(f);
    const CudaTarget target = {device, reinterpret_cast<void*>(stream)};
    void* const room = reinterpret_cast<void*>(workspace);
    run([&] { return dwconv_backward_weight_cuda(tdy, tx, tdw, tdb, c, room, target); });
  });

  m.def("multi_order_dwconv", [](py::handle x, const py::tuple& weights, const py::tuple& biases, py::handle y,
                                 const py::tuple& convs, py::handle x0, int device, uintptr_t stream) {
    const Tensor4 tx = tensor(x), ty = tensor(y), tx0 = tensor(x0);
    const MultiOrderDwConv p = multi_order(convs, weights, biases);
    const CudaTarget target = {device, reinterpret_cast<void*>(stream)};
    run([&] { return multi_order_dwconv_cuda(tx, p, ty, tx0, target); });
  });
  m.def("multi_order_dwconv_backward_workspace",
        [](py::handle dy, const py::tuple& weights, const py::tuple& biases, const py::tuple& convs) {
          return multi_order_dwconv_backward_workspace(tensor(dy), multi_order(convs, weights, biases));
        });
  m.def("multi_order_dwconv_backward",
        [](py::handle dy, py::handle x, const py::tuple& weights, const py::tuple& biases, py::handle dx,
           const py::tuple& dweights, const py::tuple& dbiases, const py::tuple& convs, py::handle x0, py::handle dx0,
           uintptr_t workspace, int device, uintptr_t stream) {
          const Tensor4 tdy = tensor(dy), tx = tensor(x), tx0 = tensor(x0), tdx0 = tensor(dx0);
          const MultiOrderDwConv p = multi_order(convs, weights, biases);
          const MultiOrderDwConvGrads grads = multi_order_grads(dx, dweights, dbiases);
          const CudaTarget target = {device, reinterpret_cast<void*>(stream)};
          void* const room = reinterpret_cast<void*>(workspace);
          run([&] { return multi_order_dwconv_backward_cuda(tdy, tx, p, grads, tx0, tdx0, room, target); });
        });

  m.def("has_filter_kernel", &has_filter_kernel);
  m.def("global_filter", [](py::handle x, py::handle w, py::handle y, int device, uintptr_t stream) {
    const Tensor4 tx = tensor(x), tw = tensor(w), ty = tensor(y);
    const CudaTarget target = {device, reinterpret_cast<void*>(stream)};
    run([&] { return global_filter_cuda(tx, tw, ty, target); });
  });
  m.def("global_filter_backward_workspace", [](py::handle dy) { return global_filter_backward_workspace(tensor(dy)); });
  m.def("global_filter_backward", [](py::handle dy, py::handle x, py::handle w, py::handle dx, py::handle dw,
                                     uintptr_t workspace, int device, uintptr_t stream) {
    const Tensor4 tdy = tensor(dy), tx = tensor(x), tw = tensor(w), tdx = tensor(dx), tdw = tensor(dw);
    const CudaTarget target = {device, reinterpret_cast<void*>(stream)};
    void* const room = reinterpret_cast<void*>(workspace);
    run([&] { return global_filter_backward_cuda(tdy, tx, tw, tdx, tdw, room, target); });
  });
}
