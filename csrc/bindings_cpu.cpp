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

  m.def("global_filter", [](py::handle x, py::handle w, py::handle y) {
    const Tensor4 tx = tensor(x), tw = tensor(w), ty = tensor(y);
    run([&] { return cpu_kernels().global_filter->forward(tx, tw, ty); });
  });
  m.def("global_filter_backward", [](py::handle dy, py::handle x, py::handle w, py::handle dx, py::handle dw) {
    const Tensor4 tdy = tensor(dy), tx = tensor(x), tw = tensor(w), tdx = tensor(dx), tdw = tensor(dw);
    run([&] { return cpu_kernels().global_filter->backward(tdy, tx, tw, tdx, tdw); });
  });

  m.def("edge_sums", [](py::handle map, py::handle sums) {
    const Tensor4 tmap = tensor(map), tsums = tensor(sums);
    run([&] { return cpu_kernels().shift_split_attention->edge_sums(tmap, tsums); });
  });
  m.def("pool", [](py::handle sums, py::handle pooled) {
    const Tensor4 tsums = tensor(sums), tpooled = tensor(pooled);
    run([&] { return cpu_kernels().shift_split_attention->pool(tsums, tpooled); });
  });
  m.def("weigh", [](py::handle x, py::handle weights, py::handle offset, py::handle y) {
    const Tensor4 tx = tensor(x), tweights = tensor(weights), toffset = tensor(offset), ty = tensor(y);
    run([&] { return cpu_kernels().shift_split_attention->weigh(tx, tweights, toffset, ty); });
  });
  m.def("weigh_backward_weights",
        [](py::handle dy, py::handle x, py::handle weights, py::handle offset, py::handle sums, py::handle y) {
          const Tensor4 tdy = tensor(dy), tx = tensor(x), tweights = tensor(weights), toffset = tensor(offset);
          const Tensor4 tsums = tensor(sums), ty = tensor(y);
          run([&] {
            return cpu_kernels().shift_split_attention->weigh_backward_weights(tdy, tx, tweights, toffset, tsums, ty);
          });
        });
  m.def("weigh_backward_input", [](py::handle dy, py::handle weights, py::handle dpooled, py::handle dx) {
    const Tensor4 tdy = tensor(dy), tweights = tensor(weights), tdpooled = tensor(dpooled), tdx = tensor(dx);
    run([&] { return cpu_kernels().shift_split_attention->weigh_backward_input(tdy, tweights, tdpooled, tdx); });
  });
}
