"""The decoding kernels compiled for GPUs that are not there; splits and steps under the
interpreter."""

import pytest
import torch
from fasttx.kernels import attention_decode as kernels

from fasttx.reference.attention_decode import attention_decode_math

from .ahead import compiled


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("head_size", [16, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_number_of_splits(splits, head_size, dtype):
    q = torch.randn(2, 4, 3, head_size).to(dtype)
    k, v = (torch.randn(2, 2, 150, d).to(dtype) for d in (head_size, 16))
    rest = (torch.tensor([150, 1], dtype=torch.int32), *[None] * 6)
    out = torch.full((2, 4, 3, 16), torch.nan, dtype=dtype)
    for call in kernels.decode_calls(
        "interpreter", out, q, k, v, *rest, 0.2, 0.0, -1, 0, splits=splits
    ):
        call.run()
    expected = attention_decode_math(q, k, v, *rest, 0.2, 0.0, -1, 0)
    # The probabilities are rounded to dtype before the second product.
    room = 8 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=room)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiles_without_spills():
    assert compiled("attention_decode")
