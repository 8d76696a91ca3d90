// What Python's tensors look like to kernels, asked of them in C: through DLPack's exchange API, which is a protocol of
// tensors and the same in all versions of PyTorch. Its structures are declared here as far as they are read.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

#include "tensor.h"

namespace vops {

struct DlTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DlExchange {
  uint32_t major, minor;
  void* older;
  void* of_owners[3];
  int (*tensor_of)(void* object, DlTensor* t);  // sets Python's error where it is none
};

// As vision_ops/_native.py has it, which gives tuples where this is not there.
enum Reading { kByDimensions = 0, kChannels = 1, kTokens = 2, kMatrix = 3 };

inline const DlExchange* exchange_of(PyObject* tensor) {
  static const DlExchange* exchange = nullptr;  // all tensors have one in common
  if (exchange) return exchange;
  PyObject* capsule = PyObject_GetAttrString((PyObject*)Py_TYPE(tensor), "__dlpack_c_exchange_api__");
  if (!capsule) return nullptr;
  auto* found = (const DlExchange*)PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  Py_DECREF(capsule);
  if (found && (found->major != 1 || !found->tensor_of)) {
    PyErr_SetString(PyExc_TypeError, "reads tensors by version 1 of DLPack's exchange API");
    return nullptr;
  }
  return exchange = found;
}

// Whether it could; Python knows why not.
inline bool read_tensor(PyObject* object, Reading how, Tensor4* t) {
  const DlExchange* exchange = exchange_of(object);
  DlTensor given;
  if (!exchange || exchange->tensor_of(object, &given)) return false;
  const auto& [code, bits, lanes] = given.dtype;
  const bool is_bfloat16 = code == 4 && bits == 16, is_float = code == 2 && (bits == 16 || bits == 32 || bits == 64);
  const int n = given.ndim;
  const int64_t *size = given.shape, *stride = given.strides;
  const bool fits = how == kTokens     ? n == 3
                    : how == kMatrix   ? n == 2 || n == 3
                    : how == kChannels ? n == 1 || n == 4
                                       : n == 1 || n == 2 || n == 4;
  constexpr int kCpu = 1;
  if ((!is_bfloat16 && !is_float) || !fits || given.device_type != kCpu) {
    PyErr_Format(PyExc_TypeError, "takes no tensor of %d dimensions, or none of its dtype or device", n);
    return false;
  }
  const Dtype dtype = is_bfloat16 ? kBFloat16 : bits == 16 ? kFloat16 : bits == 32 ? kFloat32 : kFloat64;
  void* const data = (char*)given.data + given.byte_offset;
  if (how == kTokens) {
    *t = {data, dtype, {size[0], size[2], size[1], 1}, {stride[0], stride[2], stride[1], 1}};
  } else if (how == kMatrix) {
    const int64_t samples = n == 3 ? size[0] : 1, sample = n == 3 ? stride[0] : 0;
    *t = {data, dtype, {samples, 1, size[n - 2], size[n - 1]}, {sample, 0, stride[n - 2], stride[n - 1]}};
  } else if (how == kChannels) {
    const int64_t taps = n == 4 ? size[3] * size[3] : 1;
    *t = {data, dtype, {1, size[0], 1, taps}, {0, taps, 0, 1}};
  } else if (n == 4) {
    *t = {data, dtype, {size[0], size[1], size[2], size[3]}, {stride[0], stride[1], stride[2], stride[3]}};
  } else {
    const int64_t samples = n == 2 ? size[0] : 1, sample = n == 2 ? stride[0] : 0;
    *t = {data, dtype, {samples, size[n - 1], 1, 1}, {sample, stride[n - 1], 1, 1}};
  }
  return true;
}

}  // namespace vops
