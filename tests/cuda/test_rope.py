"""rope's CUDA kernels in the emulator: the cases of tests/ops against fp64, and their traffic."""

import dataclasses
import functools

import pytest
import torch

from fasttx.ops.rope import rope_bwd, rope_fwd
from fasttx.testing import check, lay_out
from tests.ops.test_rope import CASES, GPTJ, NAMES, Case

from .cases import named, selected
from .emulated import mode, traffic

MORE = [
    Case("by eight, transposed", (2, 5, 2, 3, 64), None, (3,), {}, {"q": "transposed"}),
    Case("by eight, partial", (2, 3, 2, 3, 64), 32, (2, 3), {}, {"k": "transposed"}),
    Case("by eight, partial, interleaved", (2, 3, 2, 3, 64), 24, (3,), GPTJ),
]
QUICK = {"halves", "interleaved", "partial", "one of each", "no columns", "transposed", "strided"}
QUICK |= {"an angle a pair", "an angle a pair, interleaved", *(c.name for c in MORE)}


@pytest.mark.parametrize(("dtype", "case"), list(selected(named([*CASES, *MORE]), QUICK)))
def test_against_fp64(dtype: torch.dtype, case: Case):
    gold, plain = (functools.partial(case.plain, t) for t in (torch.float64, dtype))
    with mode(seed=len(case.name) % 3):
        check(
            case.function("cuda"), gold, plain, case.inputs(), dtype=dtype, wanted=("q", "k"),
            names=NAMES, keep=case.keep, layouts=case.layouts,
        )  # fmt: skip
        inputs = {n: t if n in case.keep else t.to(dtype) for n, t in case.inputs().items()}
        laid = {n: lay_out(t, case.layouts.get(n, "contiguous")) for n, t in inputs.items()}
        expected = case.function("cuda")(**laid)
        got = case.function("cuda")(**laid, inplace=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, check_stride=False)


def test_q_alone():
    case = dataclasses.replace(MORE[1])
    q, _, cos, sin = (t.bfloat16() for t in case.inputs().values())
    for op in (rope_fwd, rope_bwd):
        ours, theirs = (op(q, None, cos, sin, 32, False, backend=b) for b in ("cuda", "reference"))
        torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_element_moves_once(interleaved):
    q, k = torch.randn(2, 8, 5, 64).bfloat16(), torch.randn(2, 4, 5, 64).bfloat16()
    cos, sin = torch.randn(1, 5, 64), torch.randn(1, 5, 64)
    traffic()
    rope_fwd(q, k, cos, sin, 64, interleaved, backend="cuda")
    seen = traffic()
    moved = (q.numel() + k.numel()) * 2
    assert (seen.written, seen.narrow) == (moved, 0)
    # The angles are read once for four heads.
    assert seen.read == moved + 2 * (12 // 4) * 2 * 5 * 64 * 4
