// The kernels of an op exist once for each instruction set, in namespaces of their own; an op's
// binding declares one with FASTTX_BY_ISA and calls the copy for this CPU with BY_ISA(name)(...).
#pragma once

namespace fasttx {
// Index of the instruction set in use: default, avx2, avx512, avx512bf16.
int cpu_level();
}  // namespace fasttx

#define FASTTX_BY_ISA(returns, name, parameters)                                                 \
  namespace fasttx {                                                                             \
  namespace isa_default { returns name parameters; }                                             \
  namespace isa_avx2 { returns name parameters; }                                                \
  namespace isa_avx512 { returns name parameters; }                                              \
  namespace isa_avx512bf16 { returns name parameters; }                                          \
  namespace {                                                                                    \
  constexpr decltype(&isa_default::name) name##_by_isa[] = {isa_default::name, isa_avx2::name,   \
                                                            isa_avx512::name,                    \
                                                            isa_avx512bf16::name};               \
  }                                                                                              \
  }
#define BY_ISA(name) fasttx::name##_by_isa[fasttx::cpu_level()]
