"""The corrections of fasttx/kernels/interpreter.py: what runs here is what a GPU computes."""

import fasttx.kernels.common  # noqa: F401  applies the corrections
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fasttx.kernels.interpreter import convert_bits


@triton.jit
def _cast(out, x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def _dot(out, a, b, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a + i * N + j), tl.load(b + i * N + j), input_precision="ieee")
    tl.store(out + i * N + j, product)


@triton.jit
def _arithmetic(out, a, b, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x * y + x - y)


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def interesting_floats():
    """Every bf16, its neighbours half a step away and on either side of that, and random bits."""
    top = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    pattern = (top | low).reshape(-1)
    pattern = torch.cat([pattern, torch.randint(0, 2**32, (2**17,))])
    return torch.from_numpy(pattern.numpy().astype(np.uint32).view(np.float32))


def test_rounding_is_to_nearest_even_bit_for_bit():
    x = interesting_floats()
    size = 1 << 20
    x = torch.nn.functional.pad(x, (0, size - x.numel()))
    out = torch.empty(size, dtype=torch.bfloat16)
    _cast[(1,)](out, x, N=size)
    want = x.bfloat16()
    nan = x.isnan()
    assert torch.equal(bits(out)[~nan], bits(want)[~nan]) and out[nan].isnan().all()


def test_widening_is_exact():
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.empty(2**16)
    _cast[(1,)](out, x, N=2**16)
    nan = x.isnan()
    assert torch.equal(bits(out)[~nan], bits(x.float())[~nan]) and out[nan].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot(dtype):
    a, b = torch.randn(2, 64, 64).to(dtype)
    out = torch.empty(64, 64)
    _dot[(1,)](out, a, b, N=64)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_dot_carries_nonfinite():
    a, b = torch.zeros(2, 16, 16).bfloat16()
    b[3, 5] = float("nan")
    out = torch.empty(16, 16)
    _dot[(1,)](out, a, b, N=16)
    assert out[:, 5].isnan().all() and (out[:, :5] == 0).all()


def test_arithmetic():
    a, b = torch.randn(2, 256).bfloat16()
    out = torch.empty(256, dtype=torch.bfloat16)
    _arithmetic[(1,)](out, a, b, N=256)
    assert torch.equal(out, a * b + a - b)


def test_conversion_keeps_shapes():
    x = np.ones((3, 1, 5), np.float32)
    assert convert_bits(x, tl.float32, tl.bfloat16).shape == (3, 1, 5)
    assert convert_bits(np.float32(1.5), tl.float32, tl.bfloat16).shape == ()
