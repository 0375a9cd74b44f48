"""The Triton kernels of embed: rows wider than a block, runs longer than a chunk, and every kernel
compiled for GPUs that are not there."""

import pytest
import torch
from fasttx.kernels import add_norm
from fasttx.kernels import embed as kernels

from fasttx.ops.embed import embed

from .ahead import compiled


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_rows_wider_than_a_block(kind, monkeypatch):
    ids, segments = torch.randint(0, 5, (2, 3)), torch.randint(0, 2, (2, 3))
    weights = [torch.randn(s, 70) for s in (5, 3, 2)]
    weights += [torch.randn(70), torch.randn(70)]
    g, results = torch.randn(2, 3, 70), []
    for backend, elements in (("triton", 32), ("reference", 0)):
        monkeypatch.setattr(kernels, "ELEMENTS", elements)
        leaves = [t.clone().requires_grad_() for t in weights]
        out = embed(
            ids, leaves[0], leaves[1], segments, leaves[2], norm_weight=leaves[3],
            norm_bias=leaves[4], dropout_p=0.3, seed=9, kind=kind, backend=backend,
        )  # fmt: skip
        results.append([out, *torch.autograd.grad(out, leaves, g)])
    torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("count", [1, kernels.CHUNK, kernels.CHUNK + 1, 3 * kernels.CHUNK])
def test_runs_at_the_edges_of_chunks(count):
    """A run that starts, ends, fills or spans chunks, between others."""
    ids = torch.cat([torch.tensor([0, 1, 1]), torch.full((count,), 2), torch.tensor([3, 4, 4])])
    g, results = torch.randn(len(ids), 5), []
    for backend in ("triton", "reference"):
        w = torch.zeros(6, 5, requires_grad=True)
        out = embed(ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))], w,
                    padding_idx=4, backend=backend)  # fmt: skip
        results.append(torch.autograd.grad(out, w, g)[0])
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_compiles_for_every_target():
    assert compiled(
        "embed",
        {
            "embed_fwd_kernel",
            "embed_rows_kernel",
            "embed_columns_kernel",
            "embed_runs_kernel",
            "embed_join_kernel",
            add_norm.add_norm_finish_kernel.__name__,
        },
    )
