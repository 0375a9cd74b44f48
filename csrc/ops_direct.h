// Ops for the dispatcher and, the same functions, for direct calls by fasttx_find_op().
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ops.h"

namespace fasttx {
void add_op(fasttx_op* op);
}  // namespace fasttx

namespace {

// A new CPU tensor, contiguous where no strides are given.
[[maybe_unused]] Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype,
                              const int64_t* strides = nullptr) {
  int64_t contiguous[4], inner = 1;
  STD_TORCH_CHECK(dims <= 4, "fasttx: tensors of at most 4 dimensions, got ", dims);
  for (int64_t d = dims - 1; d >= 0; d--) {
    contiguous[d] = inner;
    inner *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides ? strides : contiguous,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}
[[maybe_unused]] Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}
// Contiguous, of t's sizes.
[[maybe_unused]] Tensor empty_contiguous(const Tensor& t, ScalarType dtype) {
  int64_t sizes[4];
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims <= 4, "fasttx: tensors of at most 4 dimensions, got ", dims);
  for (int64_t d = 0; d < dims; d++) sizes[d] = t.size(d);
  return empty(sizes, dims, dtype);
}
// torch.empty_like: strides of t where it is dense.
[[maybe_unused]] Tensor dense_like(const Tensor& t, ScalarType dtype) {
  int64_t sizes[4], strides[4], order[4], dims = t.dim(), wide = 0, inner = 1;
  STD_TORCH_CHECK(dims <= 4, "fasttx: tensors of at most 4 dimensions, got ", dims);
  for (int64_t d = 0; d < dims; d++) {
    sizes[d] = t.size(d);
    strides[d] = t.stride(d);
    if (sizes[d] != 1) order[wide++] = d;
  }
  std::sort(order, order + wide, [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  bool dense = true;
  for (int64_t i = 0; i < wide; i++) {
    dense &= strides[order[i]] == inner;
    inner *= sizes[order[i]];
  }
  if (!dense && t.numel() > 0) {
    const Tensor like = torch::stable::empty_like(t);
    for (int64_t d = 0; d < dims; d++) strides[d] = like.stride(d);
  }
  return empty(sizes, dims, dtype, strides);
}
[[maybe_unused]] Tensor empty_contiguous(const Tensor& t) {
  return empty_contiguous(t, t.scalar_type());
}
[[maybe_unused]] Tensor dense_like(const Tensor& t) { return dense_like(t, t.scalar_type()); }

// Of each tensor an empty one of its own, contiguous, where its bit is in `need`; else an empty one
// of no elements, of x's dtype.
template <class... T>
auto empty_gradients(const Tensor& x, int64_t need, const T&... tensors) {
  const Tensor nothing = empty({0}, x.scalar_type());
  auto one = [&](const OptionalTensor& t, int bit) {
    return t.has_value() && need >> bit & 1 ? empty_contiguous(*t) : nothing;
  };
  int bit = 0;
  return std::tuple{one(tensors, bit++)...};
}
// The dtype of sums of two floating tensors.
[[maybe_unused]] ScalarType promoted(ScalarType dtype, const OptionalTensor& t) {
  return t.has_value() && t->scalar_type() != dtype ? ScalarType::Float : dtype;
}
// [B,H,S,D] for the queries q [B,H,S,.], in the memory order [B,S,H,D].
[[maybe_unused]] Tensor empty_heads(const Tensor& q, int64_t D) {
  const int64_t B = q.size(0), H = q.size(1), S = q.size(2), row = std::max<int64_t>(D, 1);
  const int64_t token = std::max<int64_t>(H, 1) * row;
  const int64_t sizes[] = {B, H, S, D};
  const int64_t strides[] = {std::max<int64_t>(S, 1) * token, row, token, 1};
  return empty(sizes, 4, q.scalar_type(), strides);
}

// One parameter of an op: its letter, and its value from a fasttx_argument.
template <class T>
struct Parameter;
template <>
struct Parameter<Tensor> {
  static constexpr char letter = 'T';
  static Tensor read(const fasttx_argument& a) {
    AtenTensorHandle own = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_new_tensor_handle(static_cast<AtenTensorHandle>(a.tensor), &own));
    return Tensor(own);
  }
};
template <>
struct Parameter<OptionalTensor> {
  static constexpr char letter = 'O';
  static OptionalTensor read(const fasttx_argument& a) {
    if (!a.tensor) return std::nullopt;
    return Parameter<Tensor>::read(a);
  }
};
template <>
struct Parameter<double> {
  static constexpr char letter = 'd';
  static double read(const fasttx_argument& a) { return a.number; }
};
template <>
struct Parameter<int64_t> {
  static constexpr char letter = 'i';
  static int64_t read(const fasttx_argument& a) { return a.integer; }
};
template <>
struct Parameter<bool> {
  static constexpr char letter = 'b';
  static bool read(const fasttx_argument& a) { return a.integer != 0; }
};

template <class Function>
struct Signature;
template <class Result, class... P>
struct Signature<Result (*)(P...)> {
  using result = Result;
  static constexpr char letters[] = {Parameter<std::decay_t<P>>::letter..., 0};
  static auto read(const fasttx_argument* a) {
    return [&]<size_t... I>(std::index_sequence<I...>) {
      return std::tuple<std::decay_t<P>...>(Parameter<std::decay_t<P>>::read(a[I])...);
    }(std::index_sequence_for<P...>{});
  }
};

template <auto FILL>
void call_filling(const fasttx_argument* arguments, void**) {
  std::apply(FILL, Signature<decltype(FILL)>::read(arguments));
}

template <auto FILL, auto MAKE>
void call_making(const fasttx_argument* arguments, void** outputs) {
  auto inputs = Signature<decltype(MAKE)>::read(arguments);
  auto made = std::apply(MAKE, inputs);
  std::apply(FILL, std::tuple_cat(made, std::move(inputs)));
  auto give = [&](const Tensor& t) {
    AtenTensorHandle own = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t.get(), &own));
    *outputs++ = own;
  };
  std::apply([&](const auto&... t) { (give(t), ...); }, made);
}

// Registers FILL under `name`. MAKE makes the outputs from the other arguments: a tuple, equal in
// sizes, strides and dtypes to what the op's alloc in fasttx/ops makes.
template <auto FILL>
void implement(torch::stable::detail::StableLibrary& m, const char* name) {
  m.impl(name, TORCH_BOX(FILL));
  static fasttx_op op = {name, Signature<decltype(FILL)>::letters, 0, call_filling<FILL>, nullptr};
  fasttx::add_op(&op);
}
template <auto FILL, auto MAKE>
void implement(torch::stable::detail::StableLibrary& m, const char* name) {
  m.impl(name, TORCH_BOX(FILL));
  using Make = Signature<decltype(MAKE)>;
  static fasttx_op op = {name, Make::letters, std::tuple_size_v<typename Make::result>,
                         call_making<FILL, MAKE>, nullptr};
  fasttx::add_op(&op);
  // The same filling outputs that are there: for programs.
  static const std::string filling = std::string(name) + ".out";
  static fasttx_op fill = {filling.c_str(), Signature<decltype(FILL)>::letters, 0,
                           call_filling<FILL>, nullptr};
  fasttx::add_op(&fill);
}

}  // namespace
