"""The kernels of linear and ffn, one kind at a time."""

import contextlib
import ctypes
from collections.abc import Iterator

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
