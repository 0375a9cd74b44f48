// fasttx._C: what the library says about itself, direct calls of its ops, hooks of the tests.
#include <pybind11/pybind11.h>

#include <string>

#include "direct_call.h"
#include "direct_function.h"
#include "fasttx.h"
#include "peak.h"
#include "program.h"

namespace py = pybind11;

namespace {

// A one-dimensional, contiguous buffer of float or uint32.
template <class T>
T* data(const py::buffer& b, py::ssize_t items, bool writable = false) {
  const py::buffer_info info = b.request(writable);
  if (info.size != items || info.itemsize != sizeof(T))
    throw py::value_error("buffer of " + std::to_string(info.size) + " items of " +
                          std::to_string(info.itemsize) + " bytes, expected " +
                          std::to_string(items) + " of " + std::to_string(sizeof(T)));
  return static_cast<T*>(info.ptr);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("cpu_isa", &fasttx_cpu_isa, "The instruction set the CPU kernels run on.");
  m.def(
      "cpu_isas",
      [] {
        py::list names;
        for (int i = 0; const char* name = fasttx_cpu_isa_name(i); i++) names.append(name);
        return names;
      },
      "The instruction sets this CPU can run, slowest first.");
  m.def(
      "cuda_built", [] { return false; }, "Whether the library holds CUDA kernels.");

  m.def("direct", &fasttx::find_direct,
        "An op of the library as a function of its arguments' tuple, without the dispatcher; it "
        "returns NotImplemented where torch must see the call. None where there is no such op.",
        py::arg("name"), py::arg("alloc"), py::arg("dtypes"), py::arg("dtype_of"),
        py::arg("sizes"), py::arg("absent"));

  m.def("direct_function", &fasttx::direct_function,
        "(forward, backward, alike) of a Function around an op and the op of its gradients.",
        py::arg("forward"), py::arg("backward"), py::arg("slots"), py::arg("kept"));

  py::class_<fasttx::Program>(m, "Program", "Calls of the library's ops, to be made again in one go.")
      .def(py::init<>())
      .def("add", &fasttx::Program::add,
           "Append a call that fills outputs; False where the library cannot make it.",
           py::arg("name"), py::arg("outputs"), py::arg("inputs"))
      .def("run", &fasttx::Program::run, "Make calls first .. last - 1 again.", py::arg("first"),
           py::arg("last"))
      .def("__len__", &fasttx::Program::size);

  m.def("_peak", &fasttx::peak, "Multiply-adds in registers; the floating-point operations done.",
        py::arg("bf16"), py::arg("rounds"));
  m.def("_exp2", [](const py::buffer& x, const py::buffer& y, int degree) {
    const py::ssize_t n = x.request().size;
    fasttx_test_exp2(data<float>(x, n), data<float>(y, n, true), n, degree);
  });
  m.def("_tanh", [](const py::buffer& x, const py::buffer& y) {
    const py::ssize_t n = x.request().size;
    fasttx_test_tanh(data<float>(x, n), data<float>(y, n, true), n);
  });
  m.def("_round", [](const py::buffer& x, const py::buffer& y, const std::string& to) {
    const py::ssize_t n = x.request().size;
    fasttx_test_round(data<float>(x, n), data<float>(y, n, true), n,
                      to == "bfloat16" ? FASTTX_BF16 : FASTTX_F16);
  });
  m.def("_philox", [](uint64_t seed, uint32_t column_group, uint32_t row, uint32_t head,
                      uint32_t batch, const py::buffer& words) {
    const py::ssize_t n = words.request().size / 4;
    fasttx_test_philox(data<uint32_t>(words, n * 4, true), n, seed, column_group, row, head, batch);
  });
}
