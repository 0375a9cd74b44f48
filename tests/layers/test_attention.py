"""fasttx.nn.MultiheadAttention beside torch's."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fasttx.layers as fnn
from fasttx.testing import recorded_calls

from .compare import configurations, run, same, twin


def masks(rng, B, H, S, T, dtype, batched=True, causal=True):
    """key_padding_mask, attn_mask and is_causal for nn.MultiheadAttention; every query sees a
    key."""
    options = {}
    if rng.random() < 0.6:
        hidden = torch.rand(B, T) < 0.4
        hidden[:, rng.randrange(T)] = False
        options["key_padding_mask"] = hidden if batched else hidden[0]
    kind = rng.choice(("none", "bool", "float", "per head", "causal" if causal else "none"))
    if kind == "causal" and S == T and not options:
        options["attn_mask"] = torch.ones(S, T, dtype=torch.bool).triu(1)
        options["is_causal"] = rng.random() < 0.7
    elif kind == "float":
        options["attn_mask"] = torch.randn(S, T, dtype=dtype)
        if "key_padding_mask" in options:
            keys = options["key_padding_mask"]
            options["key_padding_mask"] = torch.zeros(keys.shape, dtype=dtype).masked_fill(
                keys, -torch.inf
            )
    elif kind in ("bool", "per head") and not options:
        shape = (S, T) if kind == "bool" else ((B if batched else 1) * H, S, T)
        hidden = torch.rand(shape) < 0.3
        hidden[..., rng.randrange(T)] = False
        options["attn_mask"] = hidden
    return options


@configurations
def test_multihead_attention(rng):
    H = rng.choice((1, 2, 3, 5))
    E = H * rng.choice((1, 4, 8, 20))
    B, S = rng.randint(1, 3), rng.randint(1, 9)
    kind = rng.choice(("self", "self", "shared", "all"))
    T = S if kind == "self" else rng.randint(1, 9)
    dtype = rng.choice((torch.float32, torch.bfloat16))
    options = {
        "bias": rng.random() < 0.7,
        "add_bias_kv": rng.random() < 0.2,
        "add_zero_attn": rng.random() < 0.2,
        "batch_first": rng.random() < 0.5,
        "dtype": dtype,
    }
    if kind == "all" and rng.random() < 0.5:
        options |= {"kdim": rng.choice((3, E)), "vdim": rng.choice((5, E))}
    ours = fnn.MultiheadAttention(E, H, **options)
    theirs = nn.MultiheadAttention(E, H, **options)
    twin(ours, theirs)
    training = rng.random() < 0.5
    ours.train(training)
    theirs.train(training)
    batched = rng.random() < 0.8

    def tokens(n, width):
        if not batched:
            return torch.randn(n, width, dtype=dtype)
        return torch.randn((B, n, width) if options["batch_first"] else (n, B, width), dtype=dtype)

    extra = options["add_bias_kv"] or options["add_zero_attn"]
    given = masks(rng, B, H, S, T, dtype, batched, causal=not extra)
    given["need_weights"] = rng.random() < 0.3
    given["average_attn_weights"] = rng.random() < 0.5
    query = tokens(S, E)
    if kind == "self":
        same(_Self(ours), _Self(theirs), {"query": query}, given)
        return
    key = tokens(T, options.get("kdim", E))
    if kind == "shared" and "kdim" not in options:
        same(_Shared(ours), _Shared(theirs), {"query": query, "key": key}, given)
        return
    value = tokens(T, options.get("vdim", E))
    same(ours, theirs, {"query": query, "key": key, "value": value}, given)


class _Self(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, query, **options):
        return self.inner(query, query, query, **options)


class _Shared(_Self):
    def forward(self, query, key, **options):
        return self.inner(query, key, key, **options)


def test_signature_and_representation():
    for of in (lambda c: c, lambda c: c.forward):
        assert inspect.signature(of(fnn.MultiheadAttention)) == inspect.signature(
            of(nn.MultiheadAttention)
        )
    assert repr(fnn.MultiheadAttention(8, 2)) == repr(nn.MultiheadAttention(8, 2))


def test_constructor_draws_torchs_values():
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(12, 3).state_dict()
    torch.manual_seed(3)
    ours = fnn.MultiheadAttention(12, 3).state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_the_fused_op_runs():
    x = torch.randn(2, 5, 8)
    attn = fnn.MultiheadAttention(8, 2, batch_first=True)
    with recorded_calls() as calls:
        attn(x, x, x, need_weights=False)
    assert "attention_fwd" in {op.name for op, _, _ in calls}


def test_weights_come_from_the_fused_op_where_nothing_is_differentiated():
    x = torch.randn(2, 5, 8)
    attn = fnn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad(), recorded_calls() as calls:
        attn(x, x, x)
    assert {"attention_fwd", "attention_map_fwd"} <= {op.name for op, _, _ in calls}
    weights = attn(x, x, x)[1]
    assert weights.requires_grad


@configurations
def test_weights(rng):
    H, B, S, T = rng.choice((1, 3)), rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 9)
    dtype = rng.choice((torch.float32, torch.bfloat16))
    options = {
        "add_zero_attn": rng.random() < 0.3,
        "batch_first": rng.random() < 0.5,
        "dtype": dtype,
    }
    ours, theirs = (c(8 * H, H, **options) for c in (fnn.MultiheadAttention, nn.MultiheadAttention))
    twin(ours, theirs)
    shapes = [(B, n, 8 * H) if options["batch_first"] else (n, B, 8 * H) for n in (S, T)]
    query, key = (torch.randn(s, dtype=dtype) for s in shapes)
    given = masks(rng, B, H, S, T, dtype, causal=not options["add_zero_attn"])
    given["average_attn_weights"] = rng.random() < 0.5
    for module in (ours, theirs):
        module.requires_grad_(False)
    with torch.no_grad():
        same(_Shared(ours), _Shared(theirs), {"query": query, "key": key}, given)


@pytest.mark.parametrize("average", [True, False])
def test_weights_sum_to_one(average):
    x = torch.randn(2, 5, 8)
    attn = fnn.MultiheadAttention(8, 2, batch_first=True).eval()
    hidden = torch.tensor([[False] * 5, [False, False, True, True, False]])
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            out, weights = attn(x, x, x, hidden, average_attn_weights=average)
        assert weights.shape == ((2, 5, 5) if average else (2, 2, 5, 5))
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert not weights[1, ..., 2:4].any()
        torch.testing.assert_close(out, attn(x, x, x, hidden, need_weights=False)[0])


def test_dropout_is_that_of_the_seed_and_right_on_average():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    attn = fnn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
    kept = copy.deepcopy(attn).eval()(x, x, x, need_weights=False)[0].detach()

    def draw(seed):
        torch.manual_seed(seed)
        return attn(x, x, x, need_weights=False)[0].detach()

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    draws = torch.stack([draw(seed) for seed in range(400)])
    error = (draws.mean(0) - kept).abs() / (draws.std(0) / 20 + 1e-6)
    assert error.max() < 5


def test_a_query_that_sees_nothing_gives_no_nan():
    x = torch.randn(2, 4, 8, requires_grad=True)
    attn = fnn.MultiheadAttention(8, 2, batch_first=True)
    hidden = torch.tensor([[True] * 4, [False] * 4])
    out = attn(x, x, x, hidden, need_weights=False)[0]
    assert out.isfinite().all()
    torch.testing.assert_close(out[0], attn.out_proj.bias.expand(4, 8))


def test_gradient_of_a_floating_mask():
    x, bias = torch.randn(2, 4, 8), torch.randn(4, 4, requires_grad=True)
    ours, theirs = (
        c(8, 2, batch_first=True) for c in (fnn.MultiheadAttention, nn.MultiheadAttention)
    )
    twin(ours, theirs)
    grads = [
        torch.autograd.grad(m(x, x, x, need_weights=False, attn_mask=bias)[0].square().sum(), bias)[
            0
        ]
        for m in (ours, theirs)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("make", "call"),
    [
        ({}, {"query": (5, 2, 9)}),
        ({}, {"query": (5,)}),
        ({}, {"key": (4, 2, 8)}),
        ({}, {"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}),
        ({}, {"key_padding_mask": torch.zeros(2, 5, dtype=torch.int64)}),
        ({}, {"attn_mask": torch.zeros(5, 4, dtype=torch.bool)}),
        ({}, {"attn_mask": torch.zeros(3, 5, 5)}),
        ({}, {"is_causal": True}),
        ({"num_heads": 3}, {}),
        ({"embed_dim": 0}, {}),
    ],
)
def test_what_torch_refuses_is_refused_in_its_words(make, call):
    def attempt(cls):
        attn = cls(**{"embed_dim": 8, "num_heads": 2, **make})
        shapes = dict.fromkeys(("query", "key", "value"), (5, 2, 8))
        tensors = {n: torch.zeros(call.get(n, s)) for n, s in shapes.items()}
        rest = {n: v for n, v in call.items() if n not in shapes}
        return attn(**tensors, **rest, need_weights=False)

    with pytest.raises(Exception) as theirs:  # noqa: PT011
        attempt(nn.MultiheadAttention)
    with pytest.raises(type(theirs.value)) as ours:
        attempt(fnn.MultiheadAttention)
    assert str(ours.value) == str(theirs.value)


def test_float64_and_nested_tensors_run_on_torch():
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    options = {"batch_first": True, "dtype": torch.float64}
    ours, theirs = fnn.MultiheadAttention(8, 2, **options), nn.MultiheadAttention(8, 2, **options)
    twin(ours, theirs)
    for (_, a), (_, b) in zip(
        run(_Self(ours), {"query": x}, {"need_weights": False}, None),
        run(_Self(theirs), {"query": x}, {"need_weights": False}, None),
        strict=True,
    ):
        assert (a is None and b is None) or torch.equal(a, b)
    nested = torch.nested.nested_tensor([x[0, :3].float(), x[1].float()])
    ours, theirs = ours.float().eval(), theirs.float().eval()
    with torch.no_grad():
        a, b = (m(nested, nested, nested, need_weights=False)[0] for m in (ours, theirs))
    assert all(torch.equal(s, t) for s, t in zip(a.unbind(), b.unbind(), strict=True))
    with pytest.raises(AssertionError, match="NestedTensor"):
        ours.train()(nested, nested, nested, need_weights=False)


def test_copies_and_pickles():
    attn = fnn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    out = attn(x, x, x, need_weights=False)[0]
    for other in (copy.deepcopy(attn), pickle.loads(pickle.dumps(attn))):
        assert type(other) is fnn.MultiheadAttention
        assert torch.equal(other(x, x, x, need_weights=False)[0], out)


def test_autocast():
    x = torch.randn(2, 5, 8)
    ours, theirs = (
        c(8, 2, batch_first=True) for c in (fnn.MultiheadAttention, nn.MultiheadAttention)
    )
    twin(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (m(x, x, x, need_weights=False)[0] for m in (ours, theirs))
    assert a.dtype is b.dtype is torch.bfloat16
    torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
