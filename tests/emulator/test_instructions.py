"""The emulated instructions against plain PyTorch, and planted bugs, which must be caught."""

import pytest
import torch

from .build import why_not
from .instructions import bulk_add, gemm_mma, gemm_wgmma, lanes, library, mode, traffic

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
MODES = [(eager, seed) for eager in (False, True) for seed in (0, 1, 2)]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=MODES, ids=lambda m: f"{'eager' if m[0] else 'late'}-{m[1]}")
def modes(request):
    with mode(library(), *request.param):
        yield request.param


def operands(M, N, K, dtype=torch.bfloat16):
    return torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)


def product(a, b):
    return (a.double() @ b.double().T).float()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("M", "N", "K"), [(64, 64, 32), (70, 40, 104), (1, 9, 8)])
def test_mma(modes, M, N, K, dtype):
    a, b = operands(M, N, K, dtype)
    c, sums = gemm_mma(a, b)
    torch.testing.assert_close(c, product(a, b), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sums, product(a, b).sum(1), atol=1e-3, rtol=1e-5)


def test_mma_of_a_transposed(modes):
    a, b = operands(72, 65, 40)
    c, _ = gemm_mma(a.T.contiguous(), b, transposed=True)
    torch.testing.assert_close(c, product(a, b), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("columns", "swizzle", "transposed"),
    [
        *((64, 3, 0), (64, 2, 0), (64, 1, 0), (192, 3, 0), (256, 2, 0)),
        *((128, 3, 1), (64, 2, 1), (64, 1, 1)),
    ],
)
@pytest.mark.parametrize("registers", [False, True], ids=["shared", "registers"])
def test_wgmma(columns, swizzle, transposed, registers):
    a, b = operands(72, columns + 8, 168, torch.float16 if registers else torch.bfloat16)
    expected = product(a, b)
    if transposed:
        b = b.T.contiguous()
    for eager, seed in ((False, 0), (True, 3)):
        with mode(library(), eager, seed):
            c = gemm_wgmma(a, b, columns, swizzle, transposed, registers)
        torch.testing.assert_close(c, expected, atol=1e-4, rtol=1e-5)


def test_tma_reduces(modes):
    a, b = operands(64, 64, 64)
    onto = torch.randn(64, 64)
    c = gemm_wgmma(a, b, 64, 3, onto=onto)
    torch.testing.assert_close(c, product(a, b) + onto, atol=1e-4, rtol=1e-5)


def test_bulk_copies_take_turns(modes):
    """Added in the order of the chunks: the same bits as adding them so."""
    x, onto = torch.randn(5, 96), torch.randn(96)
    expected = onto.clone()
    for chunk in x:
        expected += 2 * chunk
    assert torch.equal(bulk_add(x, onto), expected)


@pytest.mark.parametrize("bug", [1, 2], ids=["no wait for the load", "no wait for the addition"])
def test_a_planted_bug_of_bulk_copies_is_caught(bug):
    x, onto = torch.randn(3, 64), torch.randn(64)
    assert caught(lambda: bulk_add(x, onto, bug), onto + 2 * x.sum(0))


def expected_lanes(which):
    warps = [list(range(w * 32, w * 32 + 32)) for w in range(3)]
    if which == 4:
        return [sum(1 << i for i in range(32) if i % 3 == w) for w in range(3) for _ in range(32)]
    if which == 6:
        return [sum(range(96))] * 96
    if which == 7:
        return [0] * 64 + [1100 + i for i in range(32)]
    if which == 8:
        return [4] * 96
    lane = {
        0: lambda w, i: w[i ^ 5],
        1: lambda w, i: w[i + 3] if i + 3 < 32 else w[i],
        2: lambda w, i: w[i - 3] if i >= 3 else w[i],
        3: lambda w, i: w[7],
        5: lambda w, i: w[i ^ 1] if i < 16 else -1,
    }[which]
    return [lane(w, i) for w in warps for i in range(32)]


@pytest.mark.parametrize("which", range(9))
def test_lanes(modes, which):
    got = [x & 0xFFFFFFFF for x in lanes(which)]
    assert got == [x & 0xFFFFFFFF for x in expected_lanes(which)]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (9, "outside the block's 2048 bytes"),
        (10, "not aligned"),
        (11, "deadlock, no thread can go on: 93 at __shfl_xor_sync"),
        (12, "lanes of one warp are at different instructions"),
    ],
)
def test_faults_of_a_warp(which, message):
    with pytest.raises(RuntimeError, match=message):
        lanes(which)


def caught(run, expected) -> bool:
    """Whether some mode shows the bug: a fault, or a result that is not right."""
    for eager, seed in MODES:
        with mode(library(), eager, seed):
            try:
                c = run()
            except (RuntimeError, AssertionError):
                return True
        if not torch.allclose(c, expected, atol=1e-3, rtol=1e-3):
            return True
    return False


MMA_BUGS = {1: "no wait for copies", 2: "no barrier", 3: "a row beyond", 4: "divergent", 5: "half"}


@pytest.mark.parametrize("bug", MMA_BUGS, ids=MMA_BUGS.get)
def test_a_planted_bug_is_caught(bug):
    a, b = operands(65, 64, 128)
    assert not caught(lambda: gemm_mma(a, b)[0], product(a, b))
    assert caught(lambda: gemm_mma(a, b, bug=bug)[0], product(a, b))


WGMMA_BUGS = {
    1: "no wait for TMA",
    2: "no wait for the consumer",
    3: "no wait for wgmma",
    4: "wrong swizzle",
    5: "wrong byte count",
    6: "no wait for the store's read",
    7: "no fence",
}


@pytest.mark.parametrize("bug", WGMMA_BUGS, ids=WGMMA_BUGS.get)
def test_a_planted_bug_of_hopper_is_caught(bug):
    a, b = operands(64, 64, 256)
    assert not caught(lambda: gemm_wgmma(a, b, 64, 3), product(a, b))
    assert caught(lambda: gemm_wgmma(a, b, 64, 3, bug=bug), product(a, b))


def test_traffic_and_bank_conflicts_are_counted():
    traffic(library())
    a, b = operands(64, 64, 64)
    gemm_mma(a, b)
    seen = traffic(library())
    assert seen.read == 2 * 64 * 64 * 2
    assert seen.written == 64 * 64 * 4
    # The rows of the tiles are padded by 16 bytes so that eight of them meet eight bank groups.
    assert seen.shared_conflicts == 0
