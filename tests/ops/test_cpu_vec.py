"""The vector layer of the CPU kernels; test_cpu_attention.py runs this at every instruction set."""

import os

import numpy as np
import pytest
import torch

from fasttx import native
from fasttx.reference.philox import philox

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@pytest.fixture(scope="module")
def hooks():
    return pytest.importorskip("fasttx._C", reason="fasttx._C is not built (python3-dev)")


def test_the_level_asked_for_is_in_use(hooks):
    wanted = os.environ.get("FASTTX_CPU_ISA")
    assert hooks.cpu_isa() in hooks.cpu_isas()
    assert wanted is None or hooks.cpu_isa() == wanted


# The stated errors of the minimax fits, and one rounding of fp32 per step of Horner's rule.
@pytest.mark.parametrize(("degree", "bound"), [(3, 7.6e-5), (6, 2.5e-7)])
def test_exp2(hooks, degree, bound):
    x = np.linspace(-125.9, 20, 1_000_003).astype(np.float32)
    y = np.empty_like(x)
    hooks._exp2(x, y, degree)
    expected = np.exp2(x.astype(np.float64))
    assert np.abs(y / expected - 1).max() < bound


@pytest.mark.parametrize("degree", [3, 6])
def test_exp2_ends(hooks, degree):
    payload = np.array([0x7F8001FF, 0xFFC00155], np.uint32).view(np.float32)
    x = np.concatenate([np.float32([-np.inf, -1e30, -200, -3.4e38, np.nan]), payload])
    y = np.empty_like(x)
    hooks._exp2(x, y, degree)
    assert (y[:4] == 0).all()
    assert np.isnan(y[4:]).all()


def test_tanh(hooks):
    x = np.concatenate([np.linspace(-12, 12, 400_001), [1e-20, -1e-30, 1e9, np.inf, -np.inf]])
    x = x.astype(np.float32)
    y = np.empty_like(x)
    hooks._tanh(x, y)
    expected = np.tanh(x.astype(np.float64))
    assert np.abs(y - expected).max() < 1.5e-7
    assert (np.abs(y - expected) <= 4e-7 * np.abs(expected)).all()
    hooks._tanh(np.float32([np.nan]), y[:1])
    assert np.isnan(y[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even(hooks, dtype):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_003,), generator=generator, dtype=torch.int64)
    ties = torch.arange(65536) << 16 | 0x8000
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    # Between two neighbours of fp16: the ties of its normal and subnormal numbers.
    between = (halves[:-1].double() + halves[1:].double()).div(2).float()
    x = torch.cat([bits.to(torch.int32), ties.to(torch.int32)]).view(torch.float32)
    x = torch.cat([x, halves, between, torch.tensor([65519.9, 65520.0, -65536.0, 1e-8, -0.0])])
    y = torch.empty_like(x)
    hooks._round(x.numpy(), y.numpy(), str(dtype).removeprefix("torch."))
    expected = x.to(dtype).float()
    same = (y == expected) & (y.signbit() == expected.signbit()) | y.isnan() & expected.isnan()
    assert same.all(), x[~same][:5]


# Random123's known answers, kat_vectors: philox4x32 10.
KNOWN = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        0xFFFFFFFFFFFFFFFF,
        (0xFFFFFFFF,) * 4,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("seed", "counter", "words"), KNOWN)
def test_philox_known_answers(hooks, seed, counter, words):
    got = np.empty((1, 4), np.uint32)
    hooks._philox(seed, *counter, got)
    assert got[0].tolist() == list(words)


def test_philox_rows_are_those_of_the_reference(hooks):
    got = np.empty((37, 4), np.uint32)
    seed = 0x1234_5678_9ABC_DEF1
    hooks._philox(seed, 5, 1000, 11, 3, got)
    rows = torch.arange(1000, 1037)
    one = [torch.full_like(rows, x) for x in (5, 0, 11, 3)]
    expected = torch.stack(philox((one[0], rows, one[2], one[3]), seed), -1)
    assert (torch.from_numpy(got.astype(np.int64)) == expected).all()
