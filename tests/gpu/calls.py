"""Every fused op as one call: inputs on any device, the function, and the same in plain PyTorch.

`scale` multiplies the lengths: 1 is a size that even the tools that watch every access get through.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import fasttx


@dataclass
class Call:
    """make(device, dtype, scale): inputs by name. ours and plain take them; leaves are
    differentiated. random: dropout is in it, so plain cannot be compared."""

    make: Callable[[str, torch.dtype, int], dict[str, Tensor]]
    ours: Callable
    plain: Callable | None
    leaves: tuple[str, ...]
    options: dict = field(default_factory=dict)


def _normal(device, dtype, *shape):
    # From the CPU, so that a failure on one device can be looked at on another.
    return torch.randn(*shape, dtype=torch.float32).to(device, dtype)


def _qkv(B=2, H=4, G=2, S=72, D=64):
    def make(device, dtype, scale):
        q = _normal(device, dtype, B, H, S * scale, D)
        k, v = (_normal(device, dtype, B, G, S * scale, D) for _ in range(2))
        return {"q": q, "k": k, "v": v}

    return make


def _with(make, **more):
    """make's inputs and more, each of them a function of the first one."""

    def together(device, dtype, scale):
        x = make(device, dtype, scale)
        first = next(iter(x.values()))
        return x | {name: f(first) for name, f in more.items()}

    return together


def _sdpa(q, k, v, mask=None, is_causal=False):
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)


def _relative(q, k, v, table):
    bias = fasttx.RelativePositionBias(table, max_distance=32)
    buckets = bias.buckets()
    i, j = (torch.arange(t.shape[2], device=q.device) for t in (q, k))
    distance = j - i[:, None]
    reach = buckets.numel() // 2
    mask = table[buckets[distance.clamp(-reach, reach) + reach].long()].permute(2, 0, 1)[None]
    return q, k, v, mask.to(q.dtype), bias


def _mask(q):
    mask = torch.randn(q.shape[0], 1, q.shape[2], q.shape[2]).to(q)
    return mask.masked_fill(torch.rand(mask.shape).to(q.device) < 0.1, -torch.inf)


def _rows(columns=768, rows=24):
    def make(device, dtype, scale):
        x = {n: _normal(device, dtype, rows * scale, columns) for n in ("x", "residual")}
        return x | {n: _normal(device, dtype, columns) for n in ("weight", "bias")}

    return make


def _feed_forward(rows=30, K=64, hidden=96, N=48):
    def make(device, dtype, scale):
        x = {"x": _normal(device, dtype, rows * scale, K)}
        x |= {"w1": _normal(device, dtype, hidden, K) / 8, "b1": _normal(device, dtype, hidden)}
        x |= {"w2": _normal(device, dtype, N, hidden) / 8, "b2": _normal(device, dtype, N)}
        return x

    return make


def _tokens(B=3, S=20, V=90, width=64):
    def make(device, dtype, scale):
        ids = torch.randint(0, V, (B, S * scale)).to(device)
        x = {"ids": ids, "token": _normal(device, dtype, V, width)}
        x["position"] = _normal(device, dtype, S * scale, width)
        return x | {n: _normal(device, dtype, width) for n in ("weight", "bias")}

    return make


def _logits(V=1031, rows=20):
    def make(device, dtype, scale):
        target = torch.randint(0, V, (rows * scale,))
        target[::5] = -100
        return {"logits": _normal(device, dtype, rows * scale, V), "target": target.to(device)}

    return make


def _head(V=523, rows=40, width=96):
    def make(device, dtype, scale):
        target = torch.randint(0, V, (rows * scale,))
        target[::5] = -100
        return {
            "x": _normal(device, dtype, rows * scale, width),
            "weight": _normal(device, dtype, V, width) / 8,
            "target": target.to(device),
        }

    return make


def _mapped(q, k, v):
    """The whole map, of which averages over 2 x 2 cells are the averages."""
    with torch.no_grad():
        _, lse = fasttx.attention(q, k, v, is_causal=True, return_lse=True)
        p = fasttx.attention_map(q, k, lse, is_causal=True)
        cells = fasttx.attention_map(q, k, lse, pool=q.shape[2] // 2, is_causal=True)
        torch.testing.assert_close(cells, F.avg_pool2d(p, 2), rtol=1e-4, atol=1e-7)
        return p.to(q.dtype)


def _full_map(q, k, v):
    every_key = torch.eye(k.shape[2]).to(k).expand(2, 2, -1, -1)
    return _sdpa(q, k, every_key, is_causal=True)


def _scores(device, dtype, scale):
    return {"x": _normal(device, dtype, 3, 24 * scale, 70 * scale)}


def _softmax_in_place(x):
    return fasttx.softmax(x, out=x)


def _turned(x, cos, sin):
    """transformers' rotate_half."""
    low, high = x.to(cos.dtype).chunk(2, -1)
    return (x * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)


def _appended(k, lengths):
    caches = [k.new_zeros(k.shape[0], k.shape[1], 64, k.shape[3]) for _ in range(2)]
    fasttx.cache_append(*caches, k, 2 * k, lengths)
    return torch.stack(caches)


def _placed(k, lengths):
    caches = [k.new_zeros(k.shape[0], k.shape[1], 64, k.shape[3]) for _ in range(2)]
    for cache, new in zip(caches, (k, 2 * k), strict=True):
        for b, end in enumerate(lengths.tolist()):
            cache[b, :, end - k.shape[2] : end] = new[b]
    return torch.stack(caches)


QKV = ("q", "k", "v")
CALLS = {
    "attention": Call(_qkv(), lambda q, k, v: fasttx.attention(q, k, v), _sdpa, QKV),
    "attention causal": Call(
        _qkv(D=128),
        lambda q, k, v: fasttx.attention(q, k, v, is_causal=True),
        lambda q, k, v: _sdpa(q, k, v, is_causal=True),
        QKV,
    ),
    "attention mask": Call(
        _with(_qkv(), mask=_mask),
        lambda q, k, v, mask: fasttx.attention(q, k, v, mask),
        _sdpa,
        (*QKV, "mask"),
    ),
    "attention relative": Call(
        _with(_qkv(), table=lambda q: _normal(q.device, q.dtype, 32, q.shape[1])),
        lambda q, k, v, table: fasttx.attention(
            q, k, v, position_bias=fasttx.RelativePositionBias(table, max_distance=32)
        ),
        lambda q, k, v, table: _sdpa(*_relative(q, k, v, table)[:4]),
        (*QKV, "table"),
    ),
    "attention dropout": Call(
        _qkv(), lambda q, k, v: fasttx.attention(q, k, v, dropout_p=0.1, seed=7), None, QKV
    ),
    "attention_decode": Call(
        lambda device, dtype, scale: {
            "q": _normal(device, dtype, 3, 4, 1, 64),
            **{n: _normal(device, dtype, 3, 2, 200 * scale, 64) for n in ("k", "v")},
            "lengths": torch.full((3,), 200 * scale, dtype=torch.int32, device=device),
        },
        lambda q, k, v, lengths: fasttx.attention_decode(q, k, v, lengths),
        lambda q, k, v, lengths: _sdpa(q, k, v),
        (),
    ),
    "add_norm": Call(
        _rows(),
        lambda x, residual, weight, bias: fasttx.add_norm(x, residual, weight=weight, bias=bias),
        lambda x, residual, weight, bias: F.layer_norm(x + residual, x.shape[-1:], weight, bias),
        ("x", "residual", "weight", "bias"),
    ),
    "add_norm dropout": Call(
        _rows(1024),
        lambda x, residual, weight, bias: fasttx.add_norm(
            x, residual, weight=weight, kind="rms", x_bias=bias, dropout_p=0.1, seed=3
        ),
        None,
        ("x", "residual", "weight", "bias"),
    ),
    "cross_entropy": Call(
        _logits(),
        lambda logits, target: fasttx.cross_entropy(logits, target),
        lambda logits, target: F.cross_entropy(logits.float(), target),
        ("logits",),
    ),
    "cross_entropy in place": Call(
        _logits(),
        lambda logits, target: fasttx.cross_entropy(logits * 1, target, inplace_grad=True),
        lambda logits, target: F.cross_entropy(logits.float(), target),
        ("logits",),
    ),
    "cache_append": Call(
        lambda device, dtype, scale: {
            "k": _normal(device, dtype, 2, 3, 5, 64),
            "lengths": torch.tensor([5, 40], dtype=torch.int32, device=device),
        },
        lambda k, lengths: _appended(k, lengths),
        lambda k, lengths: _placed(k, lengths),
        (),
    ),
    "rope": Call(
        lambda device, dtype, scale: {
            "q": _normal(device, dtype, 2, 4, 24 * scale, 64),
            "k": _normal(device, dtype, 2, 2, 24 * scale, 64),
            "cos": torch.randn(24 * scale, 64).to(device),
            "sin": torch.randn(24 * scale, 64).to(device),
        },
        lambda q, k, cos, sin: torch.cat(fasttx.rope(q, k, cos, sin), 1),
        lambda q, k, cos, sin: _turned(torch.cat((q, k), 1), cos, sin),
        ("q", "k"),
    ),
    "rope in place": Call(
        lambda device, dtype, scale: {
            "q": _normal(device, dtype, 2, 4, 24 * scale, 64),
            "k": _normal(device, dtype, 2, 2, 24 * scale, 64),
            "cos": torch.randn(24 * scale, 64).to(device),
            "sin": torch.randn(24 * scale, 64).to(device),
        },
        lambda q, k, cos, sin: torch.cat(fasttx.rope(q * 1, k * 1, cos, sin, inplace=True), 1),
        lambda q, k, cos, sin: _turned(torch.cat((q, k), 1), cos, sin),
        ("q", "k"),
    ),
    "attention_map": Call(
        _qkv(),
        _mapped,
        _full_map,
        (),
    ),
    "softmax": Call(
        _with(_scores, mask=lambda x: torch.randn_like(x[:1, 0])),
        lambda x, mask: fasttx.softmax(x, scale=0.5, mask=mask),
        lambda x, mask: torch.softmax(0.5 * x + mask, -1),
        ("x", "mask"),
    ),
    "log_softmax along rows": Call(
        _scores,
        lambda x: fasttx.log_softmax(x, dim=1),
        lambda x: torch.log_softmax(x, 1),
        ("x",),
    ),
    "softmax in place": Call(
        _scores,
        lambda x: _softmax_in_place(x.detach() * 1),
        lambda x: torch.softmax(x, -1),
        (),
    ),
    "linear": Call(
        _feed_forward(),
        lambda x, w1, b1, **_: fasttx.linear(x, w1, b1, activation="gelu"),
        lambda x, w1, b1, **_: F.gelu(F.linear(x, w1, b1)),
        ("x", "w1", "b1"),
    ),
    "ffn": Call(
        _feed_forward(),
        lambda x, w1, b1, w2, b2: fasttx.ffn(x, w1, b1, w2, b2),
        lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
        ("x", "w1", "b1", "w2", "b2"),
    ),
    "ffn gated": Call(
        _with(_feed_forward(), gate=lambda x: torch.randn(96, 64).to(x) / 8),
        lambda x, w1, b1, w2, b2, gate: fasttx.ffn(
            x, w1, b1, w2.t().contiguous().t(), b2, activation="silu", w_gate=gate
        ),
        lambda x, w1, b1, w2, b2, gate: F.linear(
            F.silu(F.linear(x, w1, b1)) * F.linear(x, gate), w2, b2
        ),
        ("x", "w1", "b1", "w2", "b2", "gate"),
    ),
    "ffn dropout": Call(
        _feed_forward(),
        lambda x, w1, b1, w2, b2: fasttx.ffn(
            x, w1, b1, w2, b2, hidden_dropout_p=0.1, dropout_p=0.2, seed=5, recompute=True
        ),
        None,
        ("x", "w1", "b1", "w2", "b2"),
    ),
    "embed": Call(
        _tokens(),
        lambda ids, token, position, weight, bias: fasttx.embed(
            ids, token, position, norm_weight=weight, norm_bias=bias, eps=1e-5
        ),
        lambda ids, token, position, weight, bias: F.layer_norm(
            F.embedding(ids, token) + position[: ids.shape[1]], token.shape[1:], weight, bias
        ),
        ("token", "position", "weight", "bias"),
    ),
    "sample": Call(
        _logits(),
        lambda logits, target: fasttx.sample(logits, temperature=0.0),
        lambda logits, target: logits.argmax(-1),
        (),
    ),
    "sample drawn": Call(
        _logits(),
        lambda logits, target: fasttx.sample(logits, top_k=50, top_p=0.9, seed=3),
        None,
        (),
    ),
    "linear_cross_entropy none": Call(
        _head(rows=24),  # few enough for a CPU to walk as a GPU does
        lambda x, weight, target: fasttx.linear_cross_entropy(x, weight, target, reduction="none"),
        lambda x, weight, target: F.cross_entropy(
            F.linear(x, weight).float(), target, reduction="none"
        ),
        ("x", "weight"),
    ),
    "linear_cross_entropy": Call(
        _head(),
        lambda x, weight, target: fasttx.linear_cross_entropy(x, weight, target),
        lambda x, weight, target: F.cross_entropy(F.linear(x, weight).float(), target),
        ("x", "weight"),
    ),
}  # fmt: skip


def results(function: Callable, x: dict[str, Tensor], leaves: tuple[str, ...]) -> list[Tensor]:
    """The output, then the gradient of its sum with fixed random weights for every leaf."""
    x = {n: t.detach().requires_grad_(n in leaves) for n, t in x.items()}
    out = function(**x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, [x[n] for n in leaves], weights) if leaves else ()
    return [out.detach(), *grads]
