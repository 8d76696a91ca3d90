// How Python names tensors and convolutions; shared by the bindings of all devices.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "multi_order_dwconv.h"

namespace vops {

namespace py = pybind11;

// (address, dtype, N, C, H, W, and their strides), or None.
inline Tensor4 tensor(py::handle h) {
  Tensor4 t = {};
  if (h.is_none()) return t;
  const py::tuple v = py::cast<py::tuple>(h);
  if (v.size() != 10) throw std::invalid_argument("a tensor is a tuple of 10 integers");
  t.data = reinterpret_cast<void*>(py::cast<uintptr_t>(v[0]));
  t.dtype = py::cast<int>(v[1]);
  for (int i = 0; i < 4; i++) {
    t.size[i] = py::cast<int64_t>(v[2 + i]);
    t.stride[i] = py::cast<int64_t>(v[6 + i]);
  }
  return t;
}

inline DwConv conv(const py::tuple& v) {  // (kernel, stride, dilation, pad_top, pad_left)
  if (v.size() != 5) throw std::invalid_argument("a convolution is a tuple of 5 integers");
  int64_t n[5];
  for (int i = 0; i < 5; i++) n[i] = py::cast<int64_t>(v[i]);
  return {n[0], n[1], n[2], n[3], n[4]};
}

inline MultiOrderDwConv multi_order(const py::tuple& convs, const py::tuple& weights, const py::tuple& biases) {
  MultiOrderDwConv p;
  for (int i = 0; i < 3; i++) {
    p.conv[i] = conv(convs[i]);
    p.weight[i] = tensor(weights[i]);
    p.bias[i] = tensor(biases[i]);
  }
  return p;
}

inline MultiOrderDwConvGrads multi_order_grads(py::handle dx, const py::tuple& weights, const py::tuple& biases) {
  MultiOrderDwConvGrads grads = {tensor(dx), {}, {}};
  for (int i = 0; i < 3; i++) {
    grads.weight[i] = tensor(weights[i]);
    grads.bias[i] = tensor(biases[i]);
  }
  return grads;
}

template <class F>
Error without_gil(const F& f) {
  py::gil_scoped_release released;
  return f();
}

}  // namespace vops
