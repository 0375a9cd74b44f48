"""The calls that the GPU tests make, right on the CPU first: against plain PyTorch in fp64."""

import pytest
import torch

from fasttx.op import OPS
from fasttx.testing import GRADIENT_FACTOR, OUTPUT_FACTOR, compare, recorded_calls
from tests.gpu.calls import CALLS, results


def compare_with_plain(name: str, device: str, dtype: torch.dtype, scale: int) -> None:
    call = CALLS[name]
    x = call.make(device, dtype, scale)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in x.items()}
    got = results(call.ours, x, call.leaves)
    plain, gold = (results(call.plain, given, call.leaves) for given in (x, wide))
    for what, ours, theirs, exact in zip(("out", *call.leaves), got, plain, gold, strict=True):
        if not ours.is_floating_point():
            assert torch.equal(ours, exact), what
            continue
        factor = OUTPUT_FACTOR if what == "out" else GRADIENT_FACTOR
        compare(what, ours.double(), exact.double(), theirs.double(), ours.dtype, factor)


@pytest.mark.parametrize("name", [n for n, c in CALLS.items() if c.plain is not None])
def test_a_call_is_plain_pytorch(name):
    compare_with_plain(name, "cpu", torch.float32, 1)


@pytest.mark.parametrize("name", [n for n, c in CALLS.items() if c.plain is None])
def test_a_call_with_dropout_repeats_itself(name):
    call = CALLS[name]
    x = call.make("cpu", torch.float32, 1)
    first, second = (results(call.ours, x, call.leaves) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_every_op_is_called():
    """An op that is in no call would never be run on a GPU by these tests."""
    seen = set()
    for call in CALLS.values():
        with recorded_calls() as calls:
            results(call.ours, call.make("cpu", torch.float32, 1), call.leaves)
        seen |= {op.name for op, _, _ in calls}
    assert seen == set(OPS)
