// How Python calls kernels. A function of a module is a C++ one whose parameters say how the arguments are read, in
// order; tensors are tuples (address, dtype, N, C, H, W, and their strides), themselves, (themselves, Reading), or
// None. In plain C of Python: a library for this takes longer to compile than most kernels, and its calls longer than
// small kernels to run.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "multi_order_dwconv.h"
#include "relative_attention.h"
#include "tensors.h"

namespace vops {

// Each part has its own: what comes before a function is called, and what one raises that returns an error.
void prepare();
[[noreturn]] void raise(Error error);

struct PythonError {};  // Python knows which

class Arguments {
 public:
  Arguments(PyObject* const* given, Py_ssize_t count) : given_(given), count_(count) {}
  Py_ssize_t count() const { return count_; }
  PyObject* next() {
    if (at_ == count_) fail("few");
    return given_[at_++];
  }
  void end() const {
    if (at_ != count_) fail("many");
  }

 private:
  void fail(const char* how) const {
    PyErr_Format(PyExc_TypeError, "%zd arguments or items are too %s", count_, how);
    throw PythonError();
  }

  PyObject* const* given_;
  Py_ssize_t count_, at_ = 0;
};

// The items of a tuple or list.
inline Arguments items(PyObject* sequence) {
  if (PyTuple_Check(sequence) || PyList_Check(sequence)) {
    return {PySequence_Fast_ITEMS(sequence), PySequence_Fast_GET_SIZE(sequence)};
  }
  PyErr_Format(PyExc_TypeError, "takes a tuple or a list, not %s", Py_TYPE(sequence)->tp_name);
  throw PythonError();
}

template <class T>
T converted(T value) {
  if (value == (T)-1 && PyErr_Occurred()) throw PythonError();
  return value;
}

template <class T, std::enable_if_t<std::is_integral_v<T> || std::is_enum_v<T>, int> = 0>
void read(Arguments& given, T* value) {
  *value = (T)converted(PyLong_AsLongLong(given.next()));
}
inline void read(Arguments& given, double* value) { *value = converted(PyFloat_AsDouble(given.next())); }
inline void read(Arguments& given, void** address) {
  *address = (void*)converted(PyLong_AsUnsignedLongLong(given.next()));
}
inline void read(Arguments& given, Tensor4* t) {
  *t = {};
  PyObject* const view = given.next();
  if (view == Py_None) return;
  PyObject* tensor = PyTuple_Check(view) ? nullptr : view;
  Reading how = kByDimensions;
  if (!tensor && PyTuple_GET_SIZE(view) == 2) {
    tensor = PyTuple_GET_ITEM(view, 0);
    how = (Reading)converted(PyLong_AsLong(PyTuple_GET_ITEM(view, 1)));
  }
  if (tensor) {
    if (!read_tensor(tensor, how, t)) throw PythonError();
    return;
  }
  Arguments numbers = items(view);
  read(numbers, &t->data);
  read(numbers, &t->dtype);
  for (int64_t& size : t->size) read(numbers, &size);
  for (int64_t& stride : t->stride) read(numbers, &stride);
  numbers.end();
}
inline void read(Arguments& given, DwConv* conv) {  // (kernel, stride, dilation, pad_top, pad_left)
  Arguments numbers = items(given.next());
  for (int64_t* n : {&conv->kernel, &conv->stride, &conv->dilation, &conv->pad_top, &conv->pad_left}) read(numbers, n);
  numbers.end();
}
inline void read(Arguments& given, RelativeAttention* a) {  // (height, width, window_height, window_width, scale)
  Arguments numbers = items(given.next());
  for (int64_t* n : {&a->height, &a->width, &a->window_height, &a->window_width}) read(numbers, n);
  read(numbers, &a->scale);
  numbers.end();
}
template <class T, size_t N>
void read(Arguments& given, std::array<T, N>* values) {
  Arguments each = items(given.next());
  for (T& value : *values) read(each, &value);
  each.end();
}
template <class T>
void read(Arguments& given, std::vector<T>* values) {
  Arguments each = items(given.next());
  values->resize(each.count());
  for (T& value : *values) read(each, &value);
}
template <class T>
T next(Arguments& given) {
  T value;
  read(given, &value);
  return value;
}

inline PyObject* returned(Error error) {
  if (error) raise(error);
  Py_RETURN_NONE;
}
inline PyObject* returned(const std::string& text) { return PyUnicode_FromStringAndSize(text.data(), text.size()); }
inline PyObject* returned(bool value) { return PyBool_FromLong(value); }
inline PyObject* returned(int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* returned(const std::pair<int, int>& values) {
  return Py_BuildValue("(ii)", values.first, values.second);
}

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Runs body, which calls Python, as C does: a C++ exception may not get there.
template <class Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

using AnyFunction = void (*)();
// A function of a module, with the one that reads its arguments.
struct Method {
  PyMethodDef definition;
  AnyFunction function;
  PyObject* (*call)(AnyFunction, Arguments&);

  static PyObject* run(PyObject* self, PyObject* const* given, Py_ssize_t count) {
    const Method& method = *(Method*)PyCapsule_GetPointer(self, nullptr);
    Arguments arguments(given, count);
    return guarded([&] { return method.call(method.function, arguments); });
  }
};

inline void add_function(PyObject* module, PyMethodDef* definition, PyObject* self) {
  PyObject* function = PyCFunction_New(definition, self);
  if (!function || PyModule_AddObject(module, definition->ml_name, function)) throw PythonError();
}

// For a lambda put + before it.
template <class R, class... P>
void define(PyObject* module, const char* name, R (*function)(P...)) {
  auto call = [](AnyFunction erased, Arguments& given) {
    std::tuple<std::decay_t<P>...> values{next<std::decay_t<P>>(given)...};  // braces: from left to right
    given.end();
    prepare();
    auto run = [&] {
      WithoutGil released;
      return std::apply((R (*)(P...))erased, values);
    };
    return returned(run());
  };
  // Never freed, as the module is not.
  auto* method = new Method{{name, nullptr, METH_FASTCALL, nullptr}, (AnyFunction)function, call};
  method->definition.ml_meth = (PyCFunction)(AnyFunction)Method::run;
  PyObject* self = PyCapsule_New(method, nullptr, nullptr);
  if (!self) throw PythonError();
  add_function(module, &method->definition, self);
  Py_DECREF(self);
}

// PyInit_<name>, where fill(module) defines the functions.
template <class Fill>
PyObject* make_module(PyModuleDef* definition, const Fill& fill) {
  PyObject* module = PyModule_Create(definition);
  return !module ? nullptr : guarded([&] {
    fill(module);
    return module;
  });
}

inline MultiOrderDwConv multi_order(const std::array<DwConv, 3>& convs, const std::array<Tensor4, 3>& w,
                                    const std::array<Tensor4, 3>& b) {
  return {{convs[0], convs[1], convs[2]}, {w[0], w[1], w[2]}, {b[0], b[1], b[2]}};
}

}  // namespace vops
