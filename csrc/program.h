// Calls of ops of libfasttx, kept with their arguments and outputs, to be made again in one go.
#pragma once
#include <deque>

#include "direct_call.h"

namespace fasttx {

class Program {
 public:
  // Appends a call that fills `outputs` from `inputs`; false, and nothing appended, where the library
  // has no such op or an argument is not plain memory on the CPU.
  bool add(const std::string& name, const pybind11::tuple& outputs, const pybind11::tuple& inputs) {
    namespace py = pybind11;
    const fasttx_op* op = fasttx_find_op((name + ".out").c_str());
    if (!op) op = fasttx_find_op(name.c_str());
    const py::tuple values = outputs + inputs;
    if (!op || op->outputs || values.size() != strlen(op->parameters)) return false;
    Call call = {op, std::vector<fasttx_argument>(values.size())};
    int64_t elements = 0;
    for (size_t i = 0; i < values.size(); i++) {
      const py::handle value = values[i];
      const char letter = op->parameters[i];
      fasttx_argument& argument = call.arguments[i];
      if (letter == 'T' || letter == 'O') {
        argument.tensor = nullptr;
        if (letter == 'O' && value.is_none()) continue;
        addresses_.push_back(nullptr);
        const int plain = plain_tensor(value.ptr(), false, &addresses_.back(), &elements);
        if (plain < 0) throw py::error_already_set();
        if (!plain) return false;
        argument.tensor = &addresses_.back();
      } else if (letter == 'd') {
        argument.number = value.cast<double>();
      } else {
        argument.integer = value.cast<int64_t>();
      }
    }
    held_.push_back(values);
    calls_.push_back(std::move(call));
    return true;
  }

  // Makes calls first .. last - 1 again, on what their arguments hold now.
  void run(size_t first, size_t last) const {
    if (first > last || last > calls_.size()) throw pybind11::index_error("no such calls");
    const pybind11::gil_scoped_release released;
    for (size_t i = first; i < last; i++) calls_[i].op->call(calls_[i].arguments.data(), nullptr);
  }
  size_t size() const { return calls_.size(); }

 private:
  struct Call {
    const fasttx_op* op;
    std::vector<fasttx_argument> arguments;
  };
  std::vector<Call> calls_;
  std::deque<void*> addresses_;  // of tensors, which never move
  std::vector<pybind11::tuple> held_;
};

}  // namespace fasttx
