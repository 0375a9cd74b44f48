"""The building blocks beside torch's layers, beside their formula, and beside themselves."""

import itertools

import pytest
import torch
from torch import nn

import fasttx.layers as fnn
from fasttx.testing import recorded_calls

from .compare import run


def torch_names(block: nn.Module) -> dict:
    """The state of a block under the names of torch.nn.TransformerEncoderLayer, or of its
    decoder."""
    found = {}
    for name, value in block.state_dict().items():
        name = name.replace("attention.qkv.", "self_attn.in_proj_")
        name = name.replace("attention.out.", "self_attn.out_proj.")
        name = name.replace("feed_forward.", "").replace("cross.out.", "multihead_attn.out_proj.")
        if block_has_memory(block):
            name = name.replace("norm2", "norm3").replace("norm_cross", "norm2")
        found[name] = value
    for part in ("weight", "bias"):
        if f"cross.q.{part}" in found:
            both = [found.pop(f"cross.{n}.{part}") for n in ("q", "kv")]
            found[f"multihead_attn.in_proj_{part}"] = torch.cat(both)
    return found


def block_has_memory(block) -> bool:
    return getattr(block, "cross", None) is not None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("memory", [True, False])
def test_layers_are_those_of_torch_with_the_same_state(memory, norm_first, bias):
    options = {"norm_first": norm_first, "bias": bias}
    shared = {"dropout": 0.0, "activation": "gelu", "batch_first": True, **options}
    if memory:
        ours = fnn.DecoderLayer(12, 3, 20, cross={}, **options)
        theirs = nn.TransformerDecoderLayer(12, 3, 20, **shared)
        x, given = torch.randn(2, 5, 12), {"memory": torch.randn(2, 7, 12)}
        causal = {"tgt_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}
    else:
        ours = fnn.EncoderLayer(12, 3, 20, **options)
        theirs = nn.TransformerEncoderLayer(12, 3, 20, **shared)
        x, given, causal = torch.randn(2, 5, 12), {}, {}
    theirs.load_state_dict(torch_names(ours))
    torch.testing.assert_close(ours(x, **given), theirs(x, **given, **causal))
    stack = fnn.Stack([ours, ours], fnn.LayerNorm(12))
    twice = stack.norm(ours(ours(x, **given), **given))
    torch.testing.assert_close(stack(x, **given), twice)


class Formula(nn.Module):
    """A layer by its formula, in any dtype, of a block's parameters."""

    def __init__(self, block: fnn.EncoderLayer):
        super().__init__()
        self.block = block

    def forward(self, x, visible=None, bias=None, angles=None):
        b = self.block
        for norm, part in (
            (b.norm1, lambda y: self.attention(y, visible, bias, angles)),
            (b.norm2, self.feed_forward),
        ):
            x = x + part(self.norm(norm, x)) if b.norm_first else self.norm(norm, x + part(x))
        return x

    def norm(self, norm, x):
        if isinstance(norm, fnn.RMSNorm):
            return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias

    def feed_forward(self, x):
        f = self.block.feed_forward
        hidden = torch.nn.functional.silu(x @ f.linear1.weight.t() + f.linear1.bias)
        if f.gate is not None:
            hidden = hidden * (x @ f.gate.weight.t() + f.gate.bias)
        return hidden @ f.linear2.weight.t() + f.linear2.bias

    def attention(self, x, visible, bias, angles):
        a = self.block.attention
        qkv = (x @ a.qkv.weight.t() + a.qkv.bias).unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
        q, k, v = qkv.split((a.heads, a.kv_heads, a.kv_heads), 1)
        if angles is not None:
            q, k = (
                t * angles[0] + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * angles[1]
                for t in (q, k)
            )
        k, v = (t.repeat_interleave(a.heads // a.kv_heads, 1) for t in (k, v))
        logits = q @ k.transpose(-1, -2) * (a.head_dim**-0.5 if a.scale is None else a.scale)
        logits = logits if bias is None else logits + bias
        S = x.shape[1]
        if a.causal:
            hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
            visible = ~hidden if visible is None else visible & ~hidden
        if visible is not None:
            logits = logits.masked_fill(~visible, -torch.inf)
        out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        return out @ a.out.weight.t() + a.out.bias


CASES = [
    (norm, first, gated, kv, position)
    for (norm, first), (gated, kv), position in itertools.product(
        (("layer", False), ("layer", True), ("rms", True)),
        ((False, 4), (True, 2)),
        ("none", "alibi", "relative", "rotary"),
    )
]


@pytest.mark.parametrize(("norm", "norm_first", "gated", "kv_heads", "position"), CASES)
def test_layers_by_their_formula(norm, norm_first, gated, kv_heads, position):
    S, H = 6, 4
    block = fnn.EncoderLayer(
        16, H, 24, norm=norm, norm_first=norm_first, activation="silu", gated=gated,
        attention={"kv_heads": kv_heads, "head_dim": 8, "causal": position == "rotary"},
    )  # fmt: skip
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0, 0.3)
    given, plain = {}, {}
    if position == "alibi":
        given["position_bias"] = fnn.ALiBiBias(H)()
        slopes = given["position_bias"].slopes
        plain["bias"] = slopes[:, None, None].double() * torch.arange(S)
    elif position == "relative":
        module = fnn.RelativeBias(H, 8, 16)
        nn.init.normal_(module.weight)
        given["position_bias"] = module()
        places = torch.arange(S)
        buckets = given["position_bias"].buckets()[places - places[:, None] + 16]
        plain["bias"] = module.weight.detach().double()[buckets.long()].permute(2, 0, 1)
    elif position == "rotary":
        given["rotary"] = fnn.Rotary(8)(S)
        plain["angles"] = tuple(t.double() for t in given["rotary"])
    visible = torch.rand(2, 1, 1, S) < 0.7
    visible[..., 0] = True
    x = torch.randn(2, S, 16)
    got = run(block, {"x": x}, {"attn_mask": visible, **given}, None)
    wide = Formula(block.double())
    gold = run(wide, {"x": x.double()}, {"visible": visible, **plain}, None)
    for (name, mine), (_, value) in zip(got, gold, strict=True):
        torch.testing.assert_close(
            mine.double(), value, atol=2e-5 * value.abs().max().item(), rtol=0, msg=name
        )


@pytest.mark.parametrize("position", ["none", "alibi", "relative"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_stack_removes_padding_once(norm_first, position):
    layers = [fnn.EncoderLayer(16, 2, 24, norm_first=norm_first) for _ in range(2)]
    stack = fnn.Stack(layers, fnn.LayerNorm(16))
    bias = {"alibi": fnn.ALiBiBias(2), "relative": fnn.RelativeBias(2, 8, 16)}.get(position)
    x = torch.randn(3, 6, 16)
    real = torch.ones(3, 6, dtype=torch.int64)
    real[0, 4:] = real[1, :3] = 0
    given = {} if bias is None else {"position_bias": bias()}
    with recorded_calls() as calls:
        out = stack(x, padding_mask=real, **given)
    assert {a[0].shape[2] for op, a, _ in calls if op.name == "attention_fwd"} == {13}
    padded = stack(x, attn_mask=real.bool()[:, None, None, :], **given)
    torch.testing.assert_close(out[real.bool()], padded[real.bool()])
    assert not out[~real.bool()].any()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_generating_with_a_cache_is_the_whole_sequence_at_once(norm_first, kv_heads):
    torch.manual_seed(0)
    options = {"norm_first": norm_first, "attention": {"kv_heads": kv_heads}, "cross": {}}
    stack = fnn.Stack([fnn.DecoderLayer(16, 2, 24, **options) for _ in range(2)]).eval()
    rotary, x, memory = fnn.Rotary(8), torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    with torch.no_grad():
        whole = stack(x, memory=memory, rotary=rotary(7))
        cache = fnn.KVCache(2, 2, kv_heads, 7, 8)
        projected = [layer.cross.project(memory) for layer in stack.layers]
        at, steps = 0, []
        for count in (3, 1, 1, 2):
            cache.advance(count)
            steps.append(
                stack(
                    x[:, at : at + count],
                    memory=projected,
                    rotary=rotary(count, at),
                    cache=cache,
                )
            )
            at += count
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    with pytest.raises(ValueError, match="count must be in"):
        cache.advance(1)


def test_a_cache_of_left_padding():
    stack = fnn.Stack([fnn.DecoderLayer(16, 2, 24)]).eval()
    x, start = torch.randn(2, 5, 16), torch.tensor([2, 0], dtype=torch.int32)
    with torch.no_grad():
        cache = fnn.KVCache(1, 2, 2, 5, 8, start=start)
        cache.advance(4)
        first = stack(x[:, :4], cache=cache)
        cache.advance(1)
        last = stack(x[:, 4:], cache=cache)
        alone = stack(x[:1, 2:])
    torch.testing.assert_close(torch.cat((first[:1, 2:], last[:1]), 1), alone)


def test_dropout_and_hooks():
    stack = fnn.Stack([fnn.EncoderLayer(16, 2, 24, dropout=0.5, norm_first=True)] * 2)
    x, heard = torch.randn(2, 4, 16), []
    torch.manual_seed(1)
    out = stack(x)
    torch.manual_seed(1)
    assert torch.equal(stack(x), out)
    stack.eval()
    still = stack(x)
    stack.layers[0].register_forward_hook(lambda *a: heard.append("layer"))
    stack.layers[0].norm1.register_forward_hook(lambda *a: heard.append("norm"))
    torch.testing.assert_close(stack(x), still)
    assert sorted(set(heard)) == ["layer", "norm"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fnn.EncoderLayer(8, 3, 16), "heads must divide d_model"),
        (lambda: fnn.EncoderLayer(8, 4, 16, attention={"kv_heads": 3}), "kv_heads must divide"),
        (lambda: fnn.EncoderLayer(8, 2, 16, norm="batch"), "norm must be 'layer' or 'rms'"),
        (lambda: fnn.EncoderLayer(8, 2, 16, dropout=1.0), r"dropout must be in \[0, 1\)"),
        (lambda: fnn.Rotary(3), "width must be even"),
        (
            lambda: fnn.DecoderLayer(8, 2, 16, cross={})(torch.zeros(1, 2, 8)),
            "memory must be given exactly where",
        ),
        (
            lambda: fnn.Stack([fnn.EncoderLayer(8, 2, 16)])(
                torch.zeros(1, 2, 8), padding_mask=torch.ones(1, 3)
            ),
            r"padding_mask must be \[B, S\] = \(1, 2\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
