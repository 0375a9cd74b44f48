"""The Triton kernels of softmax: rows wider than a block under the interpreter, and every kernel
compiled for GPUs that are not there."""

import pytest
import torch
from fasttx.kernels import softmax as kernels

from fasttx.ops.softmax import log_softmax, softmax

from .ahead import compiled


@pytest.mark.parametrize("door", [softmax, log_softmax])
def test_rows_wider_than_a_block(door, monkeypatch):
    x, m = torch.randn(2, 6, 70), torch.randn(2, 1, 70)
    m[0, 0, :40] = -torch.inf
    g, results = torch.randn(2, 6, 70), []
    for backend, elements in (("triton", 32), ("reference", 0)):
        monkeypatch.setattr(kernels, "ELEMENTS", elements)
        leaves = [t.clone().requires_grad_() for t in (x, m)]
        out = door(leaves[0], scale=2.0, mask=leaves[1], is_causal="lower_right", backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, g)])
    torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)


def test_many_rows_share_a_mask(monkeypatch):
    """Partial sums of several parts, added in order."""
    monkeypatch.setattr(kernels, "PARTS", 3)
    monkeypatch.setattr(kernels, "ELEMENTS", 64)
    x, m, g = torch.randn(37, 5), torch.randn(5), torch.randn(37, 5)
    for shape in ((5,), (1,)):
        found = []
        for backend in ("triton", "reference"):
            leaf = m[: shape[0]].clone().requires_grad_()
            found += torch.autograd.grad(softmax(x, mask=leaf, backend=backend), leaf, g)
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiles_for_every_target():
    assert compiled(
        "softmax",
        {
            "softmax_fwd_kernel",
            "softmax_rows_kernel",
            "softmax_mask_kernel",
            "softmax_finish_kernel",
        },
    )
