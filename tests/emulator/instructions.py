"""The emulator's own kernels (kernels/*.cu) as Python functions, and its configuration."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .build import HERE, build

POINTER = ctypes.c_void_p


class Traffic(ctypes.Structure):
    """Bytes that kernels moved, and the cycles that ldmatrix and stmatrix lost on banks."""

    _fields_ = [(n, ctypes.c_int64) for n in ("read", "written", "narrow", "shared_conflicts")]


@functools.cache
def library() -> ctypes.CDLL:
    return load(str(build("instructions", sorted(HERE.glob("kernels/*.cu")))))


def load(path: str) -> ctypes.CDLL:
    found = ctypes.CDLL(path)
    found.emulator_error.restype = ctypes.c_char_p
    return found


@contextlib.contextmanager
def mode(of: ctypes.CDLL, eager: bool = False, seed: int = 0) -> Iterator[None]:
    """eager: asynchronous work is done at once, else as late as waits allow. seed: which warps run
    ahead, and the order of blocks; 0 is round robin."""
    of.emulator_configure(int(eager), ctypes.c_uint32(seed))
    try:
        yield
    finally:
        of.emulator_configure(0, ctypes.c_uint32(0))


def traffic(of: ctypes.CDLL) -> Traffic:
    """What was moved since the last call."""
    found = Traffic()
    of.emulator_traffic(ctypes.byref(found))
    return found


def pointer(t: Tensor) -> POINTER:
    return POINTER(t.data_ptr())


def checked(status: int) -> None:
    if status > 0:
        error = getattr(library(), "emulator_error", None)  # a card's library has none
        raise RuntimeError(error().decode() if error else f"cudaError {status}")
    assert status == 0, f"no such kernel ({status})"


def gemm_mma(a: Tensor, b: Tensor, transposed: bool = False, bug: int = 0):
    """(a b^T [M, N], its row sums), and a row of guards after each."""
    M, K = a.shape if not transposed else reversed(a.shape)
    N = b.shape[0]
    c = torch.full((M + 1, N), torch.nan, device=a.device)
    sums = torch.zeros(M, device=a.device)
    checked(
        library().emulator_gemm_mma(
            pointer(a), pointer(b), pointer(c), pointer(sums), M, N, K,
            a.dtype is torch.bfloat16, transposed, bug,
        )
    )  # fmt: skip
    assert c[M].isnan().all(), "a row beyond the last was written"
    return c[:M], sums


def gemm_wgmma(
    a: Tensor, b: Tensor, columns: int, swizzle: int, transposed: bool = False,
    registers: bool = False, onto: Tensor | None = None, bug: int = 0,
):  # fmt: skip
    """a b^T [M, N], or onto + a b^T."""
    M, K = a.shape
    N = b.shape[1] if transposed else b.shape[0]
    c = (
        torch.full((M + 1, N), torch.nan, device=a.device)
        if onto is None
        else torch.cat([onto, onto[:1] * torch.nan])
    )
    checked(
        library().emulator_gemm_wgmma(
            pointer(a), pointer(b), pointer(c), M, N, K, a.dtype is torch.bfloat16, columns,
            swizzle, transposed, registers, onto is not None, bug,
        )
    )  # fmt: skip
    assert c[M].isnan().all(), "a row beyond the last was written"
    return c[:M]


def bulk_add(x: Tensor, onto: Tensor, bug: int = 0) -> Tensor:
    """onto [N] + 2 x.sum(0), x [chunks, N], added chunk by chunk in their order."""
    to, counters = onto.clone(), torch.zeros(2, dtype=torch.int32, device=x.device)
    checked(library().emulator_bulk_add(pointer(x), pointer(to), pointer(counters), *x.shape, bug))
    return to


def lanes(which: int, device: str = "cpu") -> list[int]:
    out = torch.full((96 + 8,), -7, dtype=torch.int32, device=device)
    checked(library().emulator_lanes(pointer(out), which))
    return out[:96].tolist()
