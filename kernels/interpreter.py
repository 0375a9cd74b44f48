"""Corrections to Triton's interpreter, so that kernels run right on a CPU.

With TRITON_INTERPRET=1 Triton runs kernels in NumPy, which has no bfloat16: the stock interpreter
(3.6 to 3.9) multiplies the raw 16-bit patterns in `tl.dot` and in arithmetic, and truncates
fp32 -> bf16 where a GPU rounds to nearest even. `apply()` routes those operations through torch.
Kernel modules call it on import when the interpreter is on.
"""

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interp

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
# Types NumPy lacks: the interpreter keeps their bits in unsigned integers.
_BITS_ONLY = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
_SIGNED_NP = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_UNSIGNED_NP = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED_TORCH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def convert_bits(bits: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """Round `bits`, an array holding floats of type `source`, to `target`, to nearest even.

    Returns the target's bits in an unsigned array of the same shape. Infinities, NaN and
    denormals convert as on the GPU.
    """
    size_in, size_out = source.primitive_bitwidth // 8, target.primitive_bitwidth // 8
    flat = np.ascontiguousarray(bits).reshape(-1).view(_SIGNED_NP[size_in])
    values = torch.from_numpy(flat.copy()).view(_TORCH[source]).to(_TORCH[target])
    rounded = values.view(_SIGNED_TORCH[size_out]).numpy().view(_UNSIGNED_NP[size_out])
    return rounded.reshape(np.shape(bits))


def _as_numpy_float(handle) -> np.ndarray:
    dtype = handle.dtype.scalar
    if dtype in _BITS_ONLY:
        return convert_bits(handle.data, dtype, tl.float32).view(np.float32)
    return handle.data


def _patch_once(stock_patch):
    """The interpreter's `_patch_lang` without the work that an enclosing call has done already.

    It replaces all of triton.language at each call of a device function, a quarter of the time.
    """
    patched: list[frozenset] = []

    def patch_lang(fn):
        languages = frozenset(
            x.__name__ for x in fn.__globals__.values() if x is tl or x is tl.core
        )
        if any(languages <= outer for outer in patched):
            return interp._LangPatchScope()
        scope = stock_patch(fn)
        stock_restore = scope.restore
        patched.append(languages)

        def restore():  # called by a launch only, never for a device function
            patched.clear()
            stock_restore()

        scope.restore = restore
        return scope

    return patch_lang


def apply() -> None:
    """Patch the interpreter once; later calls do nothing."""
    builder = interp.InterpreterBuilder
    if getattr(builder, "_fasttx_patched", False):
        return
    builder._fasttx_patched = True

    stock_convert = interp._convert_float
    stock_binary, stock_unary = builder.binary_op, builder.unary_op
    stock_patch_tensor = interp._patch_lang_tensor

    def convert_float(data, source, target, rounding):
        nearest = rounding is None or "RTNE" in str(rounding).upper()
        if source in _TORCH and target in _TORCH and nearest:
            return convert_bits(data, source, target)
        return stock_convert(data, source, target, rounding)

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        lhs, rhs, out = _as_numpy_float(a), _as_numpy_float(b), acc.data.dtype
        wide = np.promote_types(out, np.float32) if out.kind == "f" else out
        with np.errstate(invalid="ignore", over="ignore"):
            product = np.matmul(lhs.astype(wide), rhs.astype(wide)).astype(out) + acc.data
        return interp.TensorHandle(product, acc.dtype.scalar)

    def rounded(value, dtype):
        if value.dtype == np.bool_:
            return interp.TensorHandle(value, tl.int1)
        bits = convert_bits(value.astype(np.float32), tl.float32, dtype)
        return interp.TensorHandle(bits, dtype)

    def binary_op(self, lhs, rhs, op):
        dtype = lhs.dtype.scalar
        if dtype in _BITS_ONLY:
            return rounded(op(_as_numpy_float(lhs), _as_numpy_float(rhs)), dtype)
        return stock_binary(self, lhs, rhs, op)

    def unary_op(self, arg, op):
        dtype = arg.dtype.scalar
        if dtype in _BITS_ONLY:
            return rounded(op(_as_numpy_float(arg)), dtype)
        return stock_unary(self, arg, op)

    # Triton 3.6.0 calls int() on one-element arrays of any rank, which NumPy 2.4 refuses.
    def patch_tensor(tensor, *scope):
        stock_patch_tensor(tensor, *scope)

        def index(self):
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        for target in scope:
            if hasattr(target, "set_attr"):
                target.set_attr(tensor, "__index__", index)

    interp._convert_float = convert_float
    if hasattr(interp, "_LangPatchScope"):
        interp._patch_lang = _patch_once(interp._patch_lang)
    interp._patch_lang_tensor = patch_tensor
    builder.create_dot = create_dot
    builder.binary_op = binary_op
    builder.unary_op = unary_op
