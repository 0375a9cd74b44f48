"""What the tests of attention's CUDA kernels share: the cases, how they are held, planted bugs."""

from collections.abc import Iterator

import pytest
import torch

import fasttx
from fasttx.testing import check
from tests.emulator.build import ROOT
from tests.ops.attention_cases import Case, cases

from .cases import HALF, MODES, label
from .planted import Bug, Planted

CAUSAL, LOWER = {"is_causal": True}, {"is_causal": "lower_right"}
DROP = {"dropout_p": 0.2, "seed": 5}


def alibi(slopes):
    return fasttx.ALiBi(slopes)


def selected(long: list[Case], quick: set[str], quick_long: set[str]) -> Iterator:
    """(dtype, case, schedule) of tests/ops' cases and of `long` ones; what is not quick is slow."""
    for group, names in ((cases(), quick), (long, quick_long)):
        for n, case in enumerate(group):
            for dtype in HALF:
                slow = case.name not in names or dtype is HALF[n % 2]
                name = label(dtype, "long " * (group is long) + case.name)
                marks = pytest.mark.slow if slow else ()
                yield pytest.param(dtype, case, MODES[n % 6], id=name, marks=marks)


def held(case: Case, dtype: torch.dtype, gradients: bool = True) -> None:
    """Against fp64."""
    check(
        case.function("cuda"), case.function("reference"), case.plain(dtype), case.inputs,
        dtype=dtype, wanted=case.wanted if gradients else (), names=("out", "lse"), keep=case.keep,
        layouts=case.layouts,
    )  # fmt: skip


def by_name(long: list[Case], name: str) -> Case:
    (case,) = (c for c in long if c.name == name)
    return case


def planted_kernels(name: str, bugs: list[Bug]) -> Planted:
    """All of attention's kernels, with these bugs."""
    kernels = sorted((ROOT / "csrc/cuda").glob("sm*/attention_[fb]*.cu"))
    sources = ["cuda/attention.cu", "cuda/device.cu", "ops/cuda/attention.cpp"]
    sources += [k.relative_to(ROOT / "csrc").as_posix() for k in kernels]
    return Planted(name, sources, bugs)
