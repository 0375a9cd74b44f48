"""A kernel: where it is found, and what it needs of a call, as data."""

import functools
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALF = FLOATS[1:]


@functools.cache
def _compute_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


@dataclass(frozen=True)
class Needs:
    """What a kernel can do, as data. `refuse` gives the first reason against a call, or None.

    dtypes: allowed dtypes of the argument named by `dtype_of`. sizes: {"q.3": (low, high)} bounds
    on dimensions.
    matrices: arguments that copies of 16 bytes bring in, to "rows" (their last dimension is
    contiguous), "either" (one dimension is) or the name of an argument (the same one as its).
    absent: arguments that must be None, False or 0. sm: least compute capability. env: a variable
    that must be set to a value. by_name: never chosen unless asked for.
    """

    dtypes: tuple[torch.dtype, ...] | None = FLOATS
    dtype_of: str = "q"
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    matrices: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    sm: int = 0
    env: tuple[str, str] | None = None
    by_name: bool = False

    def refuse(self, args: tuple, at: Mapping[str, int]) -> str | None:
        if self.dtypes is not None and (dtype := args[at[self.dtype_of]].dtype) not in self.dtypes:
            return f"needs {' or '.join(map(short, self.dtypes))}, got {short(dtype)}"
        for key, (low, high) in self.sizes.items():
            name, dim = _dimension(key)
            if not low <= (size := args[at[name]].shape[dim]) <= high:
                return f"needs {low} <= {name}.shape[{dim}] <= {high}, got {size}"
        for name, along in self.matrices.items():
            if (t := args[at[name]]) is None:
                continue
            like = args[at[along]] if along in at else None
            if reason := _no_matrix(t, along, like):
                return f"needs {name} {reason}"
        for name in self.absent:
            value = args[at[name]]
            if value is not None and (isinstance(value, torch.Tensor) or value):
                return f"does not support {name}"
        if self.env and os.environ.get(self.env[0]) != self.env[1]:
            return f"needs {self.env[0]}={self.env[1]}"
        if self.sm and (have := _compute_capability(args[0].device.index or 0)) < self.sm:
            return f"needs compute capability {self.sm / 10}, this device has {have / 10}"
        return None


@dataclass
class Kernel:
    """One row of an op's table: `target` is "module:function" or "native:function" in libfasttx."""

    backend: str
    target: str
    needs: Needs = Needs()
    function: Callable | None = None

    def unavailable(self, device: torch.device | None = None) -> str | None:
        """Resolve the target on first use; the reason it cannot be had, or run on that device, or
        None."""
        if self.function is None:
            module, _, name = self.target.partition(":")
            if module == "native":
                from . import native

                if reason := native.unavailable():
                    return reason
                native.load()
                found = getattr(torch.ops.fasttx_native, name, None)
                if found is None and name.endswith("_cuda"):
                    return native.why_no_cuda_kernels()
                on_cuda = device is not None and device.type == "cuda"
                if on_cuda and (reason := native.why_cuda_kernels_fail(device)):
                    return reason
                self.function = found.default
                return None
            try:
                self.function = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError) as error:
                return f"cannot be imported: {error}"
        return None

    def refuse(self, args: tuple, at: Mapping[str, int]) -> str | None:
        return self.needs.refuse(args, at) or (
            None if self.function else self.unavailable(args[0].device)
        )

    def direct(self, op) -> Callable | None:
        """The target as native.direct() has it; None where it is not native. The door counts the
        versions of arguments that the op changes."""
        module, _, name = self.target.partition(":")
        needs = self.needs
        if module != "native" or needs.env or needs.sm or needs.matrices:
            return None
        from . import native

        at = op.at
        bounds = ((_dimension(key), bound) for key, bound in needs.sizes.items())
        return native.direct(
            name,
            op.alloc if op.overload._schema.returns else None,
            dtypes=needs.dtypes or (),
            dtype_of=at[needs.dtype_of] if needs.dtypes else 0,
            sizes=[(at[of], dim, low, high) for (of, dim), (low, high) in bounds],
            absent=[at[each] for each in needs.absent],
        )


def _contiguous_dimension(t: torch.Tensor) -> int | None:
    """The dimension along which 16-byte copies can read a matrix of 16-bit numbers, if any."""
    for dim in (1, 0):
        step, others = t.stride(1 - dim), t.shape[1 - dim]
        if (t.stride(dim) == 1 or t.shape[dim] <= 1) and (
            others <= 1 or (step > 0 and step % 8 == 0)
        ):
            return dim
    return None


def _no_matrix(t: torch.Tensor, along: str, like: torch.Tensor | None) -> str | None:
    """What `Needs.matrices` has against t."""
    fake = isinstance(t, FakeTensor)
    address = t.storage_offset() * t.element_size() if fake else t.data_ptr()
    if address % 16:
        return "aligned to 16 bytes"
    dim, strides = _contiguous_dimension(t), f"got strides {tuple(t.stride())}"
    if dim is None or (along == "rows" and dim != 1):
        lines = "rows" if along == "rows" else "rows or columns"
        return f"of contiguous {lines} that begin a multiple of 16 bytes apart, {strides}"
    if like is not None and dim != _contiguous_dimension(like):
        return f"to lie in memory as {along}, of strides {tuple(like.stride())}, {strides}"
    return None


@functools.cache
def _dimension(key: str) -> tuple[str, int]:
    name, _, dim = key.partition(".")
    return name, int(dim)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
