"""A launch that fails is an error that names the kernel and the shapes."""

import pytest
import torch

import fasttx
from fasttx import native
from fasttx.op import OPS

from .emulated import card, library

X, W = torch.randn(6, 40).bfloat16(), torch.randn(40).bfloat16()
Q, ANGLES = torch.randn(1, 2, 3, 16).bfloat16(), torch.randn(3, 16)
ROWS, MASK = torch.randn(4, 24).bfloat16(), torch.randn(24)
LOGITS, TARGET = torch.randn(4, 50).bfloat16(), torch.tensor([1, 2, 3, 4])


def add_norm():
    # sum() hands back an expanded gradient: rows, columns and what adds the parts.
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    fasttx.add_norm(x, weight=w, backend="cuda").sum().backward()


def rope():
    q = Q.clone().requires_grad_()
    fasttx.rope(q, Q, ANGLES, ANGLES, backend="cuda")[0].sum().backward()


def embed(**options):
    weights = [torch.randn(n, 16).bfloat16().requires_grad_() for n in (9, 40, 2)]
    norm = {f"norm_{n}": torch.randn(16, requires_grad=True) for n in ("weight", "bias")}
    ids = torch.arange(40)[None] % 9
    args = (ids, *weights[:2], ids % 2, weights[2])
    fasttx.embed(*args, **norm, **options, backend="cuda").square().sum().backward()


def embed_odd():
    # Rows of any width; the positions' ids are sorted too.
    ids, norm = torch.arange(40)[None] % 9, torch.ones(15, requires_grad=True)
    tables = [torch.randn(n, 15).bfloat16().requires_grad_() for n in (9, 50)]
    options = {"positions": "padding", "padding_idx": 1, "norm_weight": norm, "backend": "cuda"}
    out = fasttx.embed(ids, *tables, **options)
    out.square().sum().backward()


def attention():
    # A key that lies apart and an expanded gradient are copied; sums for the mask and the table.
    q, k, v = (t.clone().requires_grad_() for t in (Q, Q.repeat(1, 1, 2, 2), Q))
    mask = torch.zeros(1, 1, 1, 6).bfloat16().requires_grad_()
    table = torch.zeros(8, 2, requires_grad=True)
    options = {"position_bias": fasttx.RelativePositionBias(table), "backend": "cuda"}
    with card(80):
        v = v.repeat(1, 1, 2, 1)
        fasttx.attention(q, k[..., ::2], v, mask, **options).sum().backward()


def attention_mask():
    q, mask = Q.clone().requires_grad_(), torch.zeros(3, 3).bfloat16().requires_grad_()
    with card(80):
        fasttx.attention(q, Q, Q, mask, backend="cuda").square().sum().backward()


def attention_decode():
    # A relative bias by distance, the splits, their sum.
    q, k, v = (torch.randn(1, n, t, 16).bfloat16() for n, t in ((2, 1), (1, 900), (1, 900)))
    bias = fasttx.RelativePositionBias(torch.zeros(8, 2))
    lengths = torch.tensor([900], dtype=torch.int32)
    fasttx.attention_decode(q, k, v, lengths, position_bias=bias, backend="cuda")


def cache_append():
    caches, lengths = torch.zeros(2, 1, 2, 9, 16).bfloat16(), torch.tensor([4], dtype=torch.int32)
    fasttx.cache_append(*caches, Q[:, :, :2], Q[:, :, :2], lengths, backend="cuda")


def softmax():
    x, mask = ROWS.clone().requires_grad_(), MASK.clone().requires_grad_()
    fasttx.softmax(x, mask=mask, backend="cuda").square().sum().backward()


def log_softmax():
    # Odd rows, and a mask of one number a row.
    x, mask = ROWS[:, 1:].clone().requires_grad_(), torch.zeros(1, 1).requires_grad_()
    fasttx.log_softmax(x, mask=mask, backend="cuda").square().sum().backward()


def softmax_down_a_column():
    x = ROWS.t().contiguous().expand(2, -1, -1).transpose(1, 2).contiguous().requires_grad_()
    fasttx.softmax(x, dim=1, backend="cuda").square().sum().backward()


def linear():
    x, w, b = (t.clone().requires_grad_() for t in (X, X.flip(0), X[0, :6]))
    fasttx.linear(x, w, b, activation="gelu", backend="cuda").sum().backward()


def ffn():
    w = [torch.randn(s).bfloat16().requires_grad_() for s in ((16, 40), (16,), (8, 16), (8,))]
    gate = {"w_gate": w[0].detach().clone().requires_grad_(), "b_gate": w[1]}
    fasttx.ffn(X, *w, **gate, activation="swiglu", backend="cuda").sum().backward()


def cross_entropy(**options):
    x = LOGITS.clone().requires_grad_()
    fasttx.cross_entropy(x, TARGET, backend="cuda", **options).mul(2).backward()


def in_place():
    x = LOGITS.clone().requires_grad_()
    fasttx.cross_entropy(x * 1, TARGET, backend="cuda", inplace_grad=True).mul(2).backward()


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        (add_norm, ["add_norm_fwd", *["add_norm_bwd"] * 3]),
        (rope, ["rope_fwd", "rope_bwd"]),
        (linear, ["linear_fwd", *["linear_bwd"] * 4]),
        (ffn, [*["ffn_fwd"] * 2, *["ffn_bwd"] * 8]),
        (embed, ["embed_fwd", *["embed_bwd"] * 11]),
        (embed_odd, ["embed_fwd", *["embed_bwd"] * 11]),
        (attention, [*["attention_fwd"] * 2, *["attention_bwd"] * 8]),
        (attention_mask, ["attention_fwd", *["attention_bwd"] * 3]),
        (attention_decode, ["attention_decode"] * 3),
        (cache_append, ["cache_append"]),
        (softmax, ["softmax_fwd", *["softmax_bwd"] * 3]),
        (log_softmax, ["softmax_fwd", *["softmax_bwd"] * 3]),
        (softmax_down_a_column, ["softmax_fwd", "softmax_bwd"]),
        (cross_entropy, [*["cross_entropy_fwd"] * 3, "cross_entropy_bwd"]),
        (in_place, [*["cross_entropy_inplace"] * 3, "cross_entropy_rescale"]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_every_launch_is_checked(call, kernels):
    for launch, kernel in enumerate(kernels):
        library().emulator_refuse(launch + 1)
        with pytest.raises(RuntimeError, match=rf"fasttx {kernel} \(CUDA\) on \[.*\]: refused"):
            call()
    # One more than there are: nothing fails, and nothing is left behind.
    library().emulator_refuse(len(kernels) + 1)
    call()
    library().emulator_refuse(0)
    call()


@pytest.mark.parametrize("op", ["add_norm_fwd", "rope_bwd", "cross_entropy_inplace"])
def test_a_library_without_them_says_so(op):
    (kernel,) = (k for k in OPS[op].tables["cuda"] if k.backend == "cuda")
    reason = kernel.unavailable()
    if native.has_cuda_kernels():
        assert reason is None
    elif native.unavailable() is None:
        assert reason.startswith("libfasttx was built without the CUDA C++ kernels")
