// What the Functions of fasttx/autograd.py do where an op and its gradient's op go directly.
#pragma once
#include <sstream>

#include "direct_call.h"

namespace fasttx {

// An op with the op of its gradients, as the Functions' data name them.
struct DirectFunction {
  // An argument of the gradients' op: t a tensor, r one of the rest, o an output, u an upstream
  // gradient, s a scalar, each by its number, or n, what is needed.
  struct Slot {
    char of;
    Py_ssize_t index;
  };
  PyObject *forward, *backward;  // of fasttx.op.Op
  PyObject* contract;            // the module fasttx.op
  std::vector<Slot> slots;
  std::vector<bool> kept;  // outputs
  PyObject *direct, *allocation_hook, *to_save, *given, *materialize_grads, *non_differentiable,
      *needs_input_grad;

  // What the op has learnt to call directly for this backend; null where it has nothing, or with an
  // error set.
  const DirectOp* of(PyObject* op, PyObject* backend) const {
    PyObject* hook = PyObject_GetAttr(contract, allocation_hook);
    if (!hook) return nullptr;
    Py_DECREF(hook);
    if (hook != Py_None) return nullptr;
    PyObject* known = PyObject_GetAttr(op, direct);
    if (!known) return nullptr;
    PyObject* call = PyDict_GetItemWithError(known, backend);
    const DirectOp* found = nullptr;
    if (call && PyCFunction_Check(call) && PyCFunction_GET_FUNCTION(call) == direct_call)
      found = static_cast<const DirectOp*>(
          PyCapsule_GetPointer(PyCFunction_GET_SELF(call), nullptr));
    Py_DECREF(known);  // a DirectOp is never freed
    return found;
  }
};

// given: (rest, scalars, backend, constant). The parts, borrowed; false with an error set.
inline bool parts_of(PyObject* given, PyObject* parts[4]) {
  if (!PyTuple_CheckExact(given) || PyTuple_GET_SIZE(given) != 4) {
    PyErr_SetString(PyExc_TypeError, "a Function's first argument is a tuple of four");
    return false;
  }
  for (int i = 0; i < 4; i++) parts[i] = PyTuple_GET_ITEM(given, i);
  for (int i : {0, 1, 3})
    if (!PyTuple_CheckExact(parts[i])) {
      PyErr_SetString(PyExc_TypeError, "rest, scalars and constant are tuples");
      return false;
    }
  return true;
}

// forward(ctx, given, tensors): the outputs, a tuple, and ctx holds what the backward reads.
inline PyObject* function_forward(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto* f = static_cast<const DirectFunction*>(PyCapsule_GetPointer(self, nullptr));
  PyObject *parts[4], *values[MOST_ARGUMENTS];
  if (!f || count != 3 || !PyTuple_CheckExact(args[2])) {
    PyErr_SetString(PyExc_TypeError, "forward(ctx, given, tensors)");
    return nullptr;
  }
  if (!parts_of(args[1], parts)) return nullptr;
  PyObject *ctx = args[0], *tensors = args[2], *rest = parts[0], *constant = parts[3];
  const DirectOp* op = f->of(f->forward, parts[2]);
  if (!op) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NOTIMPLEMENTED;
  }
  Py_ssize_t n = 0;
  for (PyObject* tuple : {tensors, rest, parts[1]})
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) {
      if (n == MOST_ARGUMENTS) Py_RETURN_NOTIMPLEMENTED;
      values[n++] = PyTuple_GET_ITEM(tuple, i);
    }
  PyObject* outputs = run_direct(*op, values, n);
  if (!outputs || outputs == Py_NotImplemented) return outputs;
  if (!PyTuple_CheckExact(outputs)) {
    PyObject* one = PyTuple_Pack(1, outputs);
    Py_DECREF(outputs);
    if (!one) return nullptr;
    outputs = one;
  }
  const Py_ssize_t inputs = PyTuple_GET_SIZE(tensors) + PyTuple_GET_SIZE(rest);
  const Py_ssize_t made = PyTuple_GET_SIZE(outputs), constants = PyTuple_GET_SIZE(constant);
  PyObject *save = PyTuple_New(inputs + made), *flat = PyTuple_New(constants);
  bool done = save && flat;
  for (Py_ssize_t i = 0; save && i < inputs; i++) PyTuple_SET_ITEM(save, i, Py_NewRef(values[i]));
  for (Py_ssize_t i = 0; save && i < made; i++) {
    const bool kept = i < (Py_ssize_t)f->kept.size() && f->kept[i];
    PyTuple_SET_ITEM(save, inputs + i, Py_NewRef(kept ? PyTuple_GET_ITEM(outputs, i) : Py_None));
  }
  for (Py_ssize_t i = 0; done && i < constants; i++) {
    const Py_ssize_t index = PyLong_AsSsize_t(PyTuple_GET_ITEM(constant, i));
    if (index < 0 || index >= made) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_IndexError, "no such output");
      done = false;
      break;
    }
    PyTuple_SET_ITEM(flat, i, Py_NewRef(PyTuple_GET_ITEM(outputs, index)));
  }
  done = done && !PyObject_SetAttr(ctx, f->to_save, save) &&
         !PyObject_SetAttr(ctx, f->given, args[1]) &&
         !PyObject_SetAttr(ctx, f->materialize_grads, Py_False) &&
         (!constants || !PyObject_SetAttr(ctx, f->non_differentiable, flat));
  Py_XDECREF(save);
  Py_XDECREF(flat);
  if (!done) Py_CLEAR(outputs);
  return outputs;
}

// backward(ctx, upstream, saved): the gradients of (given, *tensors), None where not needed.
inline PyObject* function_backward(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto* f = static_cast<const DirectFunction*>(PyCapsule_GetPointer(self, nullptr));
  if (!f || count != 3 || !PyTuple_CheckExact(args[1]) || !PyTuple_CheckExact(args[2])) {
    PyErr_SetString(PyExc_TypeError, "backward(ctx, upstream, saved)");
    return nullptr;
  }
  PyObject *ctx = args[0], *upstream = args[1], *saved = args[2], *parts[4];
  // ctx owns both as long as it lives.
  PyObject *given = PyObject_GetAttr(ctx, f->given), *wanted = nullptr, *need = nullptr,
           *grads = nullptr, *result = nullptr;
  if (given && parts_of(given, parts)) wanted = PyObject_GetAttr(ctx, f->needs_input_grad);
  const DirectOp* op = wanted ? f->of(f->backward, parts[2]) : nullptr;
  if (op) {
    const Py_ssize_t n = PyTuple_GET_SIZE(wanted) - 1, rest = PyTuple_GET_SIZE(parts[0]);
    int64_t bits = 0;
    for (Py_ssize_t i = 0; i < n; i++)
      bits |= (int64_t)(PyTuple_GET_ITEM(wanted, i + 1) == Py_True) << i;
    need = PyLong_FromLongLong(bits);
    PyObject* values[MOST_ARGUMENTS];
    bool there = need && f->slots.size() <= MOST_ARGUMENTS;
    for (size_t i = 0; there && i < f->slots.size(); i++) {
      const auto [of, index] = f->slots[i];
      PyObject* tuple = of == 'u' ? upstream : of == 's' ? parts[1] : saved;
      const Py_ssize_t at = index + (of == 'r' ? n : of == 'o' ? n + rest : 0);
      if (of == 'n') values[i] = need;
      else if ((there = at < PyTuple_GET_SIZE(tuple))) values[i] = PyTuple_GET_ITEM(tuple, at);
    }
    if (there) grads = run_direct(*op, values, (Py_ssize_t)f->slots.size());
    else if (need) grads = Py_NewRef(Py_NotImplemented);
    if (grads == Py_NotImplemented) {
      result = Py_NewRef(grads);
    } else if (grads && (result = PyTuple_New(n + 1))) {
      const bool several = PyTuple_CheckExact(grads);
      PyTuple_SET_ITEM(result, 0, Py_NewRef(Py_None));
      for (Py_ssize_t i = 0; i < n; i++) {
        PyObject* grad = Py_None;
        if ((bits >> i & 1) && !several) grad = grads;
        else if ((bits >> i & 1) && i < PyTuple_GET_SIZE(grads)) grad = PyTuple_GET_ITEM(grads, i);
        PyTuple_SET_ITEM(result, i + 1, Py_NewRef(grad));
      }
    }
  } else if (wanted && !PyErr_Occurred()) {
    result = Py_NewRef(Py_NotImplemented);
  }
  Py_XDECREF(given);
  Py_XDECREF(wanted);
  Py_XDECREF(need);
  Py_XDECREF(grads);
  return result;
}

// alike(tensors, dims): whether the tensors are float32, bfloat16 or float16, on the CPU, and each
// after the first is None or has the first's last size and as many dimensions as dims says, or, for
// 0, the first's shape. For a door: true lets it skip its checks, false says nothing.
inline PyObject* alike(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyTuple_CheckExact(args[0]) || !PyTuple_CheckExact(args[1]) ||
      PyTuple_GET_SIZE(args[0]) != PyTuple_GET_SIZE(args[1])) {
    PyErr_SetString(PyExc_TypeError, "alike(tensors, dims)");
    return nullptr;
  }
  const int64_t* first = nullptr;
  int64_t first_dims = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[0]); i++) {
    PyObject* t = PyTuple_GET_ITEM(args[0], i);
    if (i && t == Py_None) continue;
    if (Py_TYPE(t) != names().tensor && Py_TYPE(t) != names().parameter) Py_RETURN_FALSE;
    PyObject* address = PyObject_GetAttr(t, names().cdata);
    if (!address) return nullptr;
    void* implementation = PyLong_AsVoidPtr(address);
    Py_DECREF(address);
    int64_t dims;
    const int64_t* sizes = fasttx_float_sizes(&implementation, &dims);
    const int64_t wanted = PyLong_AsLongLong(PyTuple_GET_ITEM(args[1], i));
    if (wanted < 0 && PyErr_Occurred()) return nullptr;
    if (!sizes || (wanted ? dims != wanted : i ? dims != first_dims : dims < 1 || dims > 4))
      Py_RETURN_FALSE;
    if (!i) first = sizes, first_dims = dims;
    else if (sizes[dims - 1] != first[first_dims - 1]) Py_RETURN_FALSE;
    for (int64_t d = 0; !wanted && d < dims; d++)
      if (sizes[d] != first[d]) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// (forward, backward, alike) for an op, the slots of its gradients' arguments ("t0 o2 u0 ... n")
// and the outputs that they read. The first two return NotImplemented, and have done nothing, where the
// long way must be taken.
inline pybind11::tuple direct_function(pybind11::object forward, pybind11::object backward,
                                       const std::string& slots,
                                       const std::vector<Py_ssize_t>& kept) {
  namespace py = pybind11;
  static PyMethodDef methods[] = {
      {"forward", (PyCFunction)(void*)function_forward, METH_FASTCALL, nullptr},
      {"backward", (PyCFunction)(void*)function_backward, METH_FASTCALL, nullptr},
      {"alike", (PyCFunction)(void*)alike, METH_FASTCALL, nullptr}};
  auto* f = new DirectFunction{};  // never freed: there is one an op
  f->forward = forward.release().ptr();
  f->backward = backward.release().ptr();
  f->contract = py::module_::import("fasttx.op").release().ptr();
  std::istringstream words(slots);
  for (std::string word; words >> word;)
    f->slots.push_back({word[0], word.size() > 1 ? std::stol(word.substr(1)) : 0});
  for (Py_ssize_t i : kept) {
    if (i >= (Py_ssize_t)f->kept.size()) f->kept.resize(i + 1);
    f->kept[i] = true;
  }
  f->direct = PyUnicode_InternFromString("direct");
  f->allocation_hook = PyUnicode_InternFromString("allocation_hook");
  f->to_save = PyUnicode_InternFromString("to_save");
  f->given = PyUnicode_InternFromString("given");
  f->materialize_grads = PyUnicode_InternFromString("materialize_grads");
  f->non_differentiable = PyUnicode_InternFromString("non_differentiable");
  f->needs_input_grad = PyUnicode_InternFromString("needs_input_grad");
  const py::capsule self(f);
  auto made = [&](PyMethodDef* method) {
    PyObject* function = PyCFunction_New(method, self.ptr());
    if (!function) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(function);
  };
  return py::make_tuple(made(&methods[0]), made(&methods[1]), made(&methods[2]));
}

}  // namespace fasttx
