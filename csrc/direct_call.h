// Ops of libfasttx as Python functions without the dispatcher, where nothing would see the
// difference; anywhere else they return NotImplemented and have done nothing.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "fasttx.h"

namespace fasttx {

// What of torch a direct call needs, looked up once. Nothing is ever freed: torch stays loaded.
struct TorchNames {
  PyTypeObject *tensor, *parameter;
  PyObject* take;         // a list of tensors from a list of capsules with their handles
  PyObject* watchers[5];  // functions, false or 0 while no one watches or changes torch's ops
  PyObject *cdata, *is_neg, *requires_grad, *dtype;

  TorchNames() {
    namespace py = pybind11;
    const py::module_ torch = py::module_::import("torch"), c = torch.attr("_C");
    auto held = [](py::object o) { return o.release().ptr(); };
    tensor = (PyTypeObject*)held(torch.attr("Tensor"));
    parameter = (PyTypeObject*)held(torch.attr("nn").attr("Parameter"));
    take = held(c.attr("_aoti").attr("alloc_tensors_by_stealing_from_void_ptrs"));
    watchers[0] = held(c.attr("_len_torch_dispatch_stack"));
    watchers[1] = held(c.attr("_len_torch_function_stack"));
    watchers[2] = held(c.attr("_are_functorch_transforms_active"));
    watchers[3] = held(c.attr("_is_tracing"));
    watchers[4] = held(torch.attr("autograd").attr("_profiler_enabled"));
    cdata = PyUnicode_InternFromString("_cdata");
    is_neg = PyUnicode_InternFromString("is_neg");
    requires_grad = PyUnicode_InternFromString("requires_grad");
    dtype = PyUnicode_InternFromString("dtype");
  }
};
inline const TorchNames& names() {
  static const TorchNames* const n = new TorchNames;
  return *n;
}

// The result of a Python call as a truth value, its reference dropped; -1 is an error.
inline int truth(PyObject* value) {
  if (!value) return -1;
  const int is = PyObject_IsTrue(value);
  Py_DECREF(value);
  return is;
}

// 1 with the tensor's implementation if it is one that kernels can read as it stands: no subclass,
// transform, lazy negation or gradient to record. 0 if not, -1 with an error set. Its elements are
// added to *elements.
inline int plain_tensor(PyObject* object, bool recording, void** implementation,
                        int64_t* elements) {
  const TorchNames& n = names();
  if (Py_TYPE(object) != n.tensor && Py_TYPE(object) != n.parameter) return 0;
  PyObject* address = PyObject_GetAttr(object, n.cdata);
  if (!address) return -1;
  *implementation = PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  // at::Tensor is this pointer, and a handle points to one.
  const int64_t here = fasttx_plain_elements(implementation);
  if (here < 0) return 0;
  *elements += here;
  int changed = truth(PyObject_CallMethodNoArgs(object, n.is_neg));
  if (!changed && recording) changed = truth(PyObject_GetAttr(object, n.requires_grad));
  return changed < 0 ? -1 : !changed;
}

// None, a tensor or a tuple of them, which own the handles then.
inline PyObject* take_tensors(void* const* handles, Py_ssize_t count) {
  if (count == 0) Py_RETURN_NONE;
  PyObject* capsules = PyList_New(count);
  for (Py_ssize_t i = 0; capsules && i < count; i++) {
    PyObject* capsule = PyCapsule_New(handles[i], nullptr, nullptr);
    if (!capsule) Py_CLEAR(capsules);
    else PyList_SET_ITEM(capsules, i, capsule);
  }
  if (!capsules) return nullptr;
  PyObject* tensors = PyObject_CallOneArg(names().take, capsules);
  Py_DECREF(capsules);
  if (!tensors) return nullptr;
  PyObject* result = count == 1 ? PySequence_GetItem(tensors, 0) : PySequence_Tuple(tensors);
  Py_DECREF(tensors);
  return result;
}

// An op and what its kernel needs, fasttx.kernel.Needs by the numbers of the arguments.
struct DirectOp {
  struct Bound {
    Py_ssize_t argument;
    int64_t dim, low, high;
  };
  const fasttx_op* op;
  PyObject* alloc;
  Py_ssize_t dtype_of;
  std::vector<PyObject*> dtypes;  // none: any
  std::vector<Bound> sizes;
  std::vector<Py_ssize_t> absent;
};

// Whether the kernel runs a call; -1 with an error set.
inline int meets(const DirectOp& d, PyObject* const* values, const fasttx_argument* arguments) {
  if (!d.dtypes.empty()) {
    PyObject* dtype = PyObject_GetAttr(values[d.dtype_of], names().dtype);
    if (!dtype) return -1;
    Py_DECREF(dtype);
    bool found = false;
    for (PyObject* each : d.dtypes) found |= each == dtype;
    if (!found) return 0;
  }
  for (const auto& b : d.sizes) {
    const int64_t size = fasttx_tensor_size(arguments[b.argument].tensor, b.dim);
    if (size < b.low || size > b.high) return 0;
  }
  for (Py_ssize_t i : d.absent) {
    PyObject* value = values[i];
    if (value == Py_None) continue;
    if (!PyFloat_Check(value) && !PyLong_Check(value)) return 0;
    const int given = PyObject_IsTrue(value);
    if (given) return given < 0 ? -1 : 0;
  }
  return 1;
}

constexpr Py_ssize_t MOST_ARGUMENTS = 64;

// The outputs of a call (None, a tensor or a tuple), NotImplemented, or null with an error set.
inline PyObject* run_direct(const DirectOp& direct, PyObject* const* values, Py_ssize_t count) {
  const fasttx_op* op = direct.op;
  for (PyObject* watcher : names().watchers) {
    const int watching = truth(PyObject_CallNoArgs(watcher));
    if (watching < 0) return nullptr;
    if (watching) Py_RETURN_NOTIMPLEMENTED;
  }
  fasttx_argument arguments[MOST_ARGUMENTS];
  void* implementations[MOST_ARGUMENTS];
  const bool recording = fasttx_grad_mode();
  int64_t elements = 0;
  // Reads values as the parameters from `first` on; 1, 0 where one does not fit, -1 for an error.
  auto read = [&](PyObject* const* from, Py_ssize_t first, Py_ssize_t count) {
    for (Py_ssize_t i = first; i < first + count; i++) {
      PyObject* value = from[i - first];
      const char letter = op->parameters[i];
      if (letter == 'O' && value == Py_None) {
        arguments[i].tensor = nullptr;
      } else if (letter == 'O' || letter == 'T') {
        const int plain = plain_tensor(value, recording, &implementations[i], &elements);
        if (plain != 1) return plain;
        arguments[i].tensor = &implementations[i];
      } else if (letter == 'd') {
        if (!PyFloat_CheckExact(value)) return 0;
        arguments[i].number = PyFloat_AS_DOUBLE(value);
      } else {
        if (!PyLong_CheckExact(value) && !PyBool_Check(value)) return 0;
        arguments[i].integer = PyLong_AsLongLong(value);
        if (arguments[i].integer == -1 && PyErr_Occurred()) return -1;
      }
    }
    return 1;
  };
  const auto all = (Py_ssize_t)strlen(op->parameters);
  if (all > MOST_ARGUMENTS || count > all || (op->outputs && count != all))
    Py_RETURN_NOTIMPLEMENTED;
  int fits = read(values, all - count, count);
  if (fits == 1) fits = meets(direct, values, arguments + all - count);
  if (fits < 0) return nullptr;
  if (!fits) Py_RETURN_NOTIMPLEMENTED;

  PyObject* made = nullptr;
  if (direct.alloc == Py_None) {
    made = Py_NewRef(Py_None);
  } else if (!op->outputs) {
    made = PyObject_Vectorcall(direct.alloc, values, count, nullptr);
    if (!made) return nullptr;
    PyObject* tuple = PyTuple_CheckExact(made) ? Py_NewRef(made) : PyTuple_Pack(1, made);
    fits = !tuple ? -1 : PyTuple_GET_SIZE(tuple) == all - count
                         ? read(&PyTuple_GET_ITEM(tuple, 0), 0, all - count) : 0;
    Py_XDECREF(tuple);
    if (fits != 1) {
      Py_DECREF(made);
      if (fits < 0) return nullptr;
      Py_RETURN_NOTIMPLEMENTED;
    }
  }
  void* outputs[8] = {};
  std::string error;
  // Giving up the interpreter's lock costs more than a tiny kernel.
  PyThreadState* released = elements > 16384 ? PyEval_SaveThread() : nullptr;
  try {
    op->call(arguments, outputs);
  } catch (const std::exception& e) {
    error = *e.what() ? e.what() : "failed";
  }
  if (released) PyEval_RestoreThread(released);
  if (!error.empty()) {
    Py_XDECREF(made);
    PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return nullptr;
  }
  return made ? made : take_tensors(outputs, op->outputs);
}

inline PyObject* direct_call(PyObject* self, PyObject* values) {
  const auto* direct = static_cast<const DirectOp*>(PyCapsule_GetPointer(self, nullptr));
  if (!direct) return nullptr;
  if (!PyTuple_CheckExact(values)) {
    PyErr_SetString(PyExc_TypeError, "a direct call takes a tuple of arguments");
    return nullptr;
  }
  return run_direct(*direct, &PyTuple_GET_ITEM(values, 0), PyTuple_GET_SIZE(values));
}

// direct(arguments): the outputs of an op of libfasttx, or NotImplemented. alloc(*arguments) makes
// them where the library does not, and is None for an op that fills its arguments; (dtypes, dtype_of, sizes, absent) is what the kernel needs. None
// where there is no such op.
inline pybind11::object find_direct(const char* name, pybind11::object alloc,
                                    const std::vector<pybind11::object>& dtypes, int dtype_of,
                                    const std::vector<std::array<int64_t, 4>>& sizes,
                                    const std::vector<Py_ssize_t>& absent) {
  namespace py = pybind11;
  static PyMethodDef method = {"direct", direct_call, METH_O, nullptr};
  const fasttx_op* op = fasttx_find_op(name);
  if (op && op->outputs && alloc.is_none()) op = fasttx_find_op((std::string(name) + ".out").c_str());
  if (!op) return py::none();
  names();
  // Never freed: an op lives as long as its library.
  auto* direct = new DirectOp{op, alloc.release().ptr(), dtype_of, {}, {}, absent};
  for (const py::object& each : dtypes) direct->dtypes.push_back(py::object(each).release().ptr());
  for (const auto& [argument, dim, low, high] : sizes)
    direct->sizes.push_back({argument, dim, low, high});
  PyObject* function = PyCFunction_New(&method, py::capsule(direct).ptr());
  if (!function) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(function);
}

}  // namespace fasttx
