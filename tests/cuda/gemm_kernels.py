"""The kernels of linear and ffn, one kind at a time."""

import contextlib
import ctypes
from collections.abc import Iterator

import pytest

from .cases import HALF, label
from .emulated import card, library

# Name -> compute capability of the card, columns of a tile.
KERNELS = {"sm80": (80, 128), "sm90": (90, 128), "sm90 wide": (90, 256)}


@contextlib.contextmanager
def gemm_kernel(name: str, of: ctypes.CDLL | None = None) -> Iterator[None]:
    """All products on this kind of kernel, in the library `of`."""
    sm, columns = KERNELS[name]
    of = of or library()
    of.fasttx_cuda_gemm_columns(columns)
    try:
        with card(sm):
            yield
    finally:
        of.fasttx_cuda_gemm_columns(0)


def selected(cases, quick: set[str], turn: str) -> Iterator:
    """(dtype, kernel, case); the quick ones in bf16 on the kernel `turn`, else in fp16."""
    for case in cases:
        for kernel in KERNELS:
            for dtype in HALF:
                slow = case.name not in quick or dtype is HALF[kernel == turn]
                slow |= kernel == "sm90 wide" and len(case.name) % 2
                marks = pytest.mark.slow if slow else ()
                yield pytest.param(
                    dtype, kernel, case, id=label(dtype, kernel, case.name), marks=marks
                )
