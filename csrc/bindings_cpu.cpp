#include <new>

#include "bindings.h"
#include "runtime.h"

using namespace vops;

namespace {

template <class F>
void run(const F& f) {
  const Error error = without_gil(f);
  if (error == kOutOfMemory) throw std::bad_alloc();
  if (error) throw std::runtime_error(error);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.attr("isa") = cpu_kernels().isa;

  m.def("dwconv", [](py::handle x, py::handle w, py::handle b, py::handle y, const py::tuple& f, int activation) {
    const Tensor4 tx = tensor(x), tw = tensor(w), tb = tensor(b), ty = tensor(y);
    const DwConv c = conv(f);
    run([&] { return cpu_kernels().dwconv->forward(tx, tw, tb, ty, c, Activation(activation)); });
  });
  m.def("dwconv_backward_activation", [](py::handle dy, py::handle x, py::handle w, py::handle b, py::handle du,
                                         const py::tuple& f, int activation) {
    const Tensor4 tdy = tensor(dy), tx = tensor(x), tw = tensor(w), tb = tensor(b), tdu = tensor(du);
    const DwConv c = conv(f);
    run([&] { return cpu_kernels().dwconv->backward_activation(tdy, tx, tw, tb, tdu, c, Activation(activation)); });
  });
  m.def("dwconv_backward_input", [](py::handle dy, py::handle w, py::handle dx, const py::tuple& f) {
    const Tensor4 tdy = tensor(dy), tw = tensor(w), tdx = tensor(dx);
    const DwConv c = conv(f);
    run([&] { return cpu_kernels().dwconv->backward_input(tdy, tw, tdx, c); });
  });
  m.def("dwconv_backward_weight", [](py::handle dy, py::handle x, py::handle dw, py::handle db, const py::tuple& f) {
    const Tensor4 tdy = tensor(dy), tx = tensor(x), tdw = tensor(dw), tdb = tensor(db);
    const DwConv c = conv(f);
    run([&] { return cpu_kernels().dwconv->backward_weight(tdy, tx, tdw, tdb, c); });
  });

  m.def("multi_order_dwconv",
        [](py::handle x, const py::tuple& weights, const py::tuple& biases, py::handle y, const py::tuple& convs) {
          const Tensor4 tx = tensor(x), ty = tensor(y);
          const MultiOrderDwConv p = multi_order(convs, weights, biases);
          run([&] { return cpu_kernels().multi_order_dwconv->forward(tx, p, ty); });
        });
  m.def("multi_order_dwconv_backward",
        [](py::handle dy, py::handle x, const py::tuple& weights, const py::tuple& biases, py::handle dx,
           const py::tuple& dweights, const py::tuple& dbiases, const py::tuple& convs) {
          const Tensor4 tdy = tensor(dy), tx = tensor(x);
          const MultiOrderDwConv p = multi_order(convs, weights, biases);
          const MultiOrderDwConvGrads grads = multi_order_grads(dx, dweights, dbiases);
          run([&] { return cpu_kernels().multi_order_dwconv->backward(tdy, tx, p, grads); });
        });

  m.def("layer_norm_2d", [](py::handle x, py::handle w, py::handle b, py::handle y, double eps) {
    const Tensor4 tx = tensor(x), tw = tensor(w), tb = tensor(b), ty = tensor(y);
    run([&] { return cpu_kernels().layer_norm_2d->forward(tx, tw, tb, ty, eps); });
  });
  m.def("layer_norm_2d_backward",
        [](py::handle dy, py::handle x, py::handle w, py::handle dx, py::handle dw, py::handle db, double eps) {
          const Tensor4 tdy = tensor(dy), tx = tensor(x), tw = tensor(w), tdx = tensor(dx), tdw = tensor(dw),
                        tdb = tensor(db);
          run([&] { return cpu_kernels().layer_norm_2d->backward(tdy, tx, tw, tdx, tdw, tdb, eps); });
        });

  m.def("gate", [](py::handle u, py::handle b, py::handle q, py::handle p) {
    const Tensor4 tu = tensor(u), tb = tensor(b), tq = tensor(q), tp = tensor(p);
    run([&] { return cpu_kernels().gated_recursion->gate(tu, tb, tq, tp); });
  });
  m.def("gate_backward",
        [](py::handle dp, py::handle u, py::handle b, py::handle q, py::handle du, py::handle dq, py::handle db) {
          const Tensor4 tdp = tensor(dp), tu = tensor(u), tb = tensor(b), tq = tensor(q);
          const Tensor4 tdu = tensor(du), tdq = tensor(dq), tdb = tensor(db);
          run([&] { return cpu_kernels().gated_recursion->gate_backward(tdp, tu, tb, tq, tdu, tdq, tdb); });
        });
  m.def("channel_sums", [](py::handle t, py::handle sums) {
    const Tensor4 tt = tensor(t), tsums = tensor(sums);
    run([&] { return cpu_kernels().gated_recursion->channel_sums(tt, tsums); });
  });

  m.def("gram", [](py::handle a, py::handle b, py::handle u, py::handle v, py::handle gram, py::handle norms) {
    const Tensor4 ta = tensor(a), tb = tensor(b), tu = tensor(u), tv = tensor(v), tg = tensor(gram), tn = tensor(norms);
    run([&] { return cpu_kernels().cross_covariance->gram(ta, tb, tu, tv, tg, tn); });
  });
  m.def("cosine_softmax", [](py::handle gram, py::handle norms, py::handle temperature, py::handle weights) {
    const Tensor4 tg = tensor(gram), tn = tensor(norms), tt = tensor(temperature), tw = tensor(weights);
    run([&] { return cpu_kernels().cross_covariance->softmax(tg, tn, tt, tw); });
  });
  m.def("cosine_softmax_backward", [](py::handle grad, py::handle weights, py::handle gram, py::handle norms,
                                      py::handle temperature, py::handle scales, py::handle dtemperature) {
    const Tensor4 td = tensor(grad), tw = tensor(weights), tg = tensor(gram), tn = tensor(norms);
    const Tensor4 tt = tensor(temperature), ts = tensor(scales), tdt = tensor(dtemperature);
    run([&] { return cpu_kernels().cross_covariance->softmax_backward(td, tw, tg, tn, tt, ts, tdt); });
  });
  m.def("apply_by_head",
        [](py::handle matrix, bool transposed, py::handle x, py::handle scale, py::handle z, py::handle y) {
          const Tensor4 tm = tensor(matrix), tx = tensor(x), ts = tensor(scale), tz = tensor(z), ty = tensor(y);
          run([&] { return cpu_kernels().cross_covariance->apply(tm, transposed, tx, ts, tz, ty); });
        });
  m.def("global_filter", [](py::handle x, py::handle w, py::handle y) {
    const Tensor4 tx = tensor(x), tw = tensor(w), ty = tensor(y);
    run([&] { return cpu_kernels().global_filter->forward(tx, tw, ty); });
  });
  m.def("global_filter_backward", [](py::handle dy, py::handle x, py::handle w, py::handle dx, py::handle dw) {
    const Tensor4 tdy = tensor(dy), tx = tensor(x), tw = tensor(w), tdx = tensor(dx), tdw = tensor(dw);
    run([&] { return cpu_kernels().global_filter->backward(tdy, tx, tw, tdx, tdw); });
  });
}
