// The C interface of libfasttx: plain structs in, an int status out. Kernels include no torch header.
#pragma once
#include <stdint.h>

#define FASTTX_API extern "C" __attribute__((visibility("default")))

enum fasttx_dtype {
  FASTTX_F32 = 0,
  FASTTX_BF16 = 1,
  FASTTX_F16 = 2,
  FASTTX_BOOL = 3,
  FASTTX_I32 = 4,
  FASTTX_I64 = 5,
};

enum fasttx_status {
  FASTTX_OK = 0,
  FASTTX_NOT_BUILT = 1,
  FASTTX_NO_MEMORY = 2,
  FASTTX_BAD_DTYPE = 3,
};

// A strided tensor of at most four dimensions, leading dimension first; unused trailing dimensions
// have size 1 and stride 0. Strides are in elements. data == NULL: the tensor is absent.
typedef struct fasttx_tensor {
  void* data;
  int32_t dtype;
  int64_t sizes[4];
  int64_t strides[4];
} fasttx_tensor;

// Every argument of attention_fwd and attention_bwd; the meaning is that of the inner op.
//   q [B,H,S,D], k [B,G,T,D], v [B,G,T,Dv], out [B,H,S,Dv], lse [B,H,S] fp32
//   mask [B|1,H|1,S|1,T|1] bool or floating, slopes [B|1,H], positions [B|1,T] fp32,
//   table [buckets,H], lut [2*M+1] int32, cu_q, cu_k [sequences+1] int32, seed [1] int64
//   dq, dk, dv, dmask, dtable: like their forward tensors; dout [B,H,S,Dv], dlse [B,H,S] fp32
// The forward reads none of the gradients; the backward reads out and lse.
typedef struct fasttx_attention {
  fasttx_tensor out, lse;
  fasttx_tensor q, k, v;
  fasttx_tensor mask, slopes, positions, table, lut, cu_q, cu_k, seed;
  fasttx_tensor dq, dk, dv, dmask, dtable, dout, dlse;
  double scale;
  double softcap;    // 0: none
  double dropout_p;
  int64_t left;      // -1: unbounded
  int64_t right;     // -1: unbounded
  int64_t bias_shift;
  int32_t lower_right;
  int32_t need;      // backward: dq 1, dk 2, dv 4, dmask 8, dtable 16
} fasttx_attention;

// The instruction set in use: "default", "avx2", "avx512" or "avx512bf16"; the best this CPU has,
// or the lower one named by the environment variable FASTTX_CPU_ISA when the library is loaded.
FASTTX_API const char* fasttx_cpu_isa(void);
// The i-th instruction set this CPU can run, NULL past the last.
FASTTX_API const char* fasttx_cpu_isa_name(int i);
FASTTX_API const char* fasttx_status_text(int status);

// How kernels get their threads: run(n, task, context) calls task(context, i) once for each i in
// [0, n), at most threads() of them at once. Set by ops.cpp; without it everything is serial.
typedef void (*fasttx_run_fn)(int64_t n, void (*task)(void* context, int64_t i), void* context);
FASTTX_API void fasttx_set_threads(fasttx_run_fn run, int (*threads)(void));

// The ops once more, for a caller that holds plain CPU tensors and needs no dispatcher.
// parameters: a letter each, T a tensor, O one that may be absent, d double, i int64_t, b bool.
// A tensor is an AtenTensorHandle, borrowed, NULL where absent. call() makes `outputs` tensors and
// fills them, handles that the caller owns then; with outputs == 0 it fills its first arguments. It
// throws what is a std::exception.
typedef union fasttx_argument {
  void* tensor;
  double number;
  int64_t integer;
} fasttx_argument;
typedef struct fasttx_op {
  const char* name;
  const char* parameters;
  int64_t outputs;
  void (*call)(const fasttx_argument* arguments, void** outputs);
  const struct fasttx_op* next;
} fasttx_op;
// NULL where no op has this name.
FASTTX_API const fasttx_op* fasttx_find_op(const char* name);
// The elements of a tensor that is strided, on the CPU, its data in memory; -1 for any other.
FASTTX_API int64_t fasttx_plain_elements(void* tensor);
// A dimension of a tensor, -1 where it has none such.
FASTTX_API int64_t fasttx_tensor_size(void* tensor, int64_t dim);
// The sizes of a tensor of float32, bfloat16 or float16 on the CPU, and how many in *dims; NULL for any
// other.
FASTTX_API const int64_t* fasttx_float_sizes(void* tensor, int64_t* dims);
// Whether autograd records.
FASTTX_API int fasttx_grad_mode(void);

// Test hooks, all in the instruction set in use.
FASTTX_API void fasttx_test_exp2(const float* x, float* y, int64_t n, int degree);
FASTTX_API void fasttx_test_tanh(const float* x, float* y, int64_t n);
// words [n][4]: Philox4x32-10 of counters (column_group, row + i, head, batch), i < n.
FASTTX_API void fasttx_test_philox(uint32_t* words, int64_t n, uint64_t seed, uint32_t column_group,
                                   uint32_t row, uint32_t head, uint32_t batch);
// y = x rounded to bf16 (to == FASTTX_BF16) or fp16 (FASTTX_F16) and back.
FASTTX_API void fasttx_test_round(const float* x, float* y, int64_t n, int to);
