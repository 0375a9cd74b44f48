"""The Triton kernels of add_norm: rows wider than a block under the interpreter, and every kernel
compiled for GPUs that are not there."""

import pytest
import torch
from fasttx.kernels import add_norm as kernels

from fasttx.ops.add_norm import add_norm

from .ahead import compiled


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_rows_wider_than_a_block(kind, monkeypatch):
    x, residual = torch.randn(1, 2, 2, 70), torch.randn(2, 2, 1, 70).permute(2, 1, 0, 3)
    vectors = torch.randn(3, 70)
    results = []
    for backend, elements in (("triton", 32), ("reference", 0)):
        monkeypatch.setattr(kernels, "ELEMENTS", elements)
        leaves = [t.clone().requires_grad_() for t in (x, residual, *vectors)]
        leaves[1] = residual.detach().requires_grad_()
        out, total = add_norm(
            *leaves[:2], weight=leaves[2], bias=leaves[3], x_bias=leaves[4], dropout_p=0.3, seed=9,
            kind=kind, prenorm=True, backend=backend,
        )  # fmt: skip
        loss = (out * x).sum() + total.square().sum()
        results.append([out, total, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)


def test_offsets_past_32_bits_are_64_bit():
    x = torch.empty(1, dtype=torch.float32, device="meta").as_strided((4, 3), (2**40, 2**31))
    stats = torch.empty(2, 4, device="meta")
    out = torch.empty(4, 3, device="meta")
    (call,) = kernels.forward_calls(
        "sm90", out, None, stats, x, None, None, None, None, None, 1e-5, 0.0, False, False, False
    )
    assert call.features.WIDE


@pytest.mark.slow
def test_compiles_for_every_target():
    assert compiled(
        "add_norm",
        {
            "add_norm_fwd_kernel",
            "add_norm_rows_kernel",
            "add_norm_columns_kernel",
            "add_norm_finish_kernel",
        },
    )
