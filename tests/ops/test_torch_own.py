"""Backend "torch" of softmax and attention: PyTorch's kernels with fasttx's meaning."""

import pytest
import torch

import fasttx
from fasttx.op import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = torch.inf, torch.nan


def both(name: str, args: tuple) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ours by "torch", the reference's) of each output."""
    found = [OPS[name](*args, backend=b) for b in ("torch", "reference")]
    found = [t if isinstance(t, tuple) else (t,) for t in found]
    return [(a, b) for a, b in zip(*found, strict=True) if b.numel()]


def close(pairs, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for ours, exact in pairs:
        assert ours.dtype is exact.dtype
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance, equal_nan=True)


def rows(dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(7, 33).to(dtype)
    x[1] = -INF
    x[2, 5] = -INF
    x[3, 4] = NAN
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_softmax(dtype, log, scale):
    x = rows(dtype)
    scalars = (scale, False, False, log)
    close(both("softmax_fwd", (x, None, *scalars, False)), dtype)
    out = torch.empty_like(x)
    OPS["softmax_out"](out, x, None, *scalars, False, backend="torch")
    expected = OPS["softmax_fwd"](x, None, *scalars, False, backend="torch")
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    own = x.clone()
    OPS["softmax_out"](own, own, None, *scalars, False, backend="torch")
    torch.testing.assert_close(own, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_softmax_backward(dtype, log, hidden):
    x = torch.randn(7, 33).to(dtype)
    dout = torch.randn_like(x)
    if hidden:
        x[1], x[2, 5] = -INF, -INF
        dout[2, 5] = NAN
    y = OPS["softmax_fwd"](x, None, 0.5, False, False, log, False, backend="reference")
    close(both("softmax_bwd", (dout, y, x, None, 0.5, False, False, log, 1)), dtype)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 3, 1, 5), (4,)])
def test_softmax_shapes(shape):
    x = torch.randn(shape)
    torch.testing.assert_close(fasttx.softmax(x, backend="torch"), torch.softmax(x, -1))
    first = torch.randn(5, 3).t()
    torch.testing.assert_close(
        fasttx.log_softmax(first, dim=0, backend="torch"), torch.log_softmax(first, 0)
    )


def attention_args(
    dtype, heads=(4, 4), sizes=(5, 9), causal=False, left=-1, lower_right=False, mask=None
):
    (H, G), (S, T) = heads, sizes
    q, k, v = (torch.randn(2, h, n, 8).to(dtype) for h, n in ((H, S), (G, T), (G, T)))
    absent = (None,) * 7
    return q, k, v, mask, *absent, 0.3, 0.0, 0.0, left, 0 if causal else -1, lower_right, 0


# The second sequence has no key, of the first's rows the first one has none under a band.
PADDING = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 0, 0], [0] * 9])[:, None, None] == 1
CALLS = {
    "plain": {},
    "mask": {"mask": PADDING},
    "mask, causal": {"mask": PADDING, "causal": True},
    "added mask of every row": {"mask": torch.randn(1, 4, 5, 9).masked_fill(PADDING[:1], -INF)},
    "mask of queries": {"mask": PADDING[:, :, 0, :5, None]},
    "groups": {"heads": (6, 2)},
    "causal": {"causal": True},
    "causal, fewer keys": {"causal": True, "sizes": (9, 5)},
    "last aligned": {"causal": True, "lower_right": True},
    "last aligned square": {"causal": True, "lower_right": True, "sizes": (6, 6)},
    "window": {"causal": True, "left": 2},
    "no keys": {"sizes": (3, 0)},
    "no rows": {"sizes": (0, 3)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_attention(dtype, call):
    args = attention_args(dtype, **CALLS[call])
    close(both("attention_fwd", args), dtype)
    for backend in ("torch", "reference"):
        out, lse = OPS["attention_fwd"](*args, backend=backend)
        dout = torch.randn_like(out)
        found = both("attention_bwd", (dout, None, *args[:3], out, lse, *args[3:], 7))
        close(found, dtype)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("which", ["k", "v"])
def test_what_the_band_hides_reaches_nothing(bad, which):
    args = attention_args(torch.float32, sizes=(6, 6), causal=True)
    args[{"k": 1, "v": 2}[which]][:, :, 3:] = bad
    out, lse = OPS["attention_fwd"](*args, backend="torch")
    assert out[:, :, :3].isfinite().all()
    assert not out[:, :, 3:].isfinite().all()
    dout = torch.zeros_like(out)
    dout[:, :, :3] = 1
    found = OPS["attention_bwd"](dout, None, *args[:3], out, lse, *args[3:], 7, backend="torch")
    exact = OPS["attention_bwd"](dout, None, *args[:3], out, lse, *args[3:], 7, backend="reference")
    for a, b in zip(found[:3], exact[:3], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(
    "refused",
    [
        {"dropout_p": 0.5, "seed": 1},
        {"softcap": 5.0},
        {"position_bias": fasttx.ALiBi(torch.ones(4))},
        {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_it_leaves_to_others(refused):
    """Dropout above all: its bits are fasttx's."""
    (kernel,) = (k for k in OPS["attention_fwd"].tables["cpu"] if k.backend == "torch")
    q, k, v, *_ = attention_args(torch.float32)
    if "cu_seqlens" in refused:
        q, k, v = (torch.randn(1, 4, 5, 8) for _ in range(3))
    told = fasttx.explain(fasttx.attention, q, k, v, **refused)
    why = {b: w for op, b, w, _ in told.rows if op == "attention_fwd"}
    assert "does not support" in why["torch"]
    assert kernel.needs.by_name


def test_errors_are_those_of_torch():
    """Against float64, as far from it as SDPA in the same dtype."""
    q, k, v, *rest = attention_args(torch.bfloat16, sizes=(64, 64))
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in (q, k, v)), scale=0.3
    )
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    out, _ = OPS["attention_fwd"](q, k, v, *rest, backend="torch")
    assert (out.double() - exact).norm() <= 1.01 * (plain.double() - exact).norm()
