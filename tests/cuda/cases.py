"""Which cases the tests of the CUDA kernels run, in which dtype, and which of them are quick."""

from collections.abc import Iterable, Iterator

import pytest
import torch

HALF = (torch.bfloat16, torch.float16)
# What every schedule must give the same bits in: (eager, seed) of the emulator.
MODES = [(eager, seed) for eager in (False, True) for seed in (0, 1, 2)]


def label(dtype: torch.dtype, *words: str) -> str:
    return "-".join([str(dtype).removeprefix("torch."), *words])


def selected(named: Iterable[tuple[str, object]], quick: set[str]) -> Iterator:
    """(dtype, case) of every case by its name; quick ones run by turns in bf16 and in fp16, the
    rest is slow."""
    for n, (name, case) in enumerate(named):
        for dtype in HALF:
            slow = name not in quick or dtype is HALF[n % 2]
            marks = pytest.mark.slow if slow else ()
            yield pytest.param(dtype, case, id=label(dtype, name), marks=marks)


def named(cases: Iterable) -> Iterator[tuple[str, object]]:
    return ((case.name, case) for case in cases)
