"""fasttx.nn.Linear beside torch's, and FeedForward beside its formula."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fasttx.layers as fnn

from .compare import configurations, same, twin

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": nn.GELU("tanh"),
    "relu": F.relu,
    "silu": F.silu,
    torch.tanh: torch.tanh,
}


@configurations
def test_linear(rng):
    sizes = [rng.choice((1, 2, 7, 32, 65)) for _ in range(2)]
    options = {"bias": rng.random() < 0.7, "dtype": rng.choice((torch.float32, torch.bfloat16))}
    ours, theirs = fnn.Linear(*sizes, **options), nn.Linear(*sizes, **options)
    twin(ours, theirs)
    shape = [rng.randint(1, 5) for _ in range(rng.randint(0, 3))]
    same(ours, theirs, {"input": torch.randn(*shape, sizes[0], dtype=options["dtype"])})


class Plain(nn.Module):
    """The same parameters and formula of torch's parts."""

    def __init__(self, like, act):
        super().__init__()
        self.act = act
        for name, part in like.named_children():
            if isinstance(part, nn.Linear):
                plain = nn.Linear(
                    part.in_features,
                    part.out_features,
                    part.bias is not None,
                    dtype=part.weight.dtype,
                )
                setattr(self, name, plain)

    def forward(self, x):
        hidden = self.act(self.linear1(x))
        return self.linear2(hidden * self.gate(x) if hasattr(self, "gate") else hidden)


@configurations
def test_feed_forward(rng):
    sizes = [rng.choice((1, 2, 7, 32, 65)) for _ in range(2)]
    name = rng.choice(list(ACTIVATIONS))
    dtype = rng.choice((torch.float32, torch.bfloat16))
    ours = fnn.FeedForward(
        *sizes,
        activation=name,
        bias=rng.random() < 0.7,
        gated=rng.random() < 0.5,
        recompute=rng.random() < 0.3,
        dtype=dtype,
    )
    theirs = Plain(ours, ACTIVATIONS[name])
    twin(ours, theirs)
    shape = [rng.randint(1, 5) for _ in range(rng.randint(0, 2))]
    same(ours, theirs, {"x": torch.randn(*shape, sizes[0], dtype=dtype)})


def test_linear_signature_and_errors():
    assert inspect.signature(fnn.Linear) == inspect.signature(nn.Linear)
    assert repr(fnn.Linear(3, 4)) == repr(nn.Linear(3, 4))
    for x in (torch.randn(2, 4), torch.randn(2, 3, dtype=torch.float64)):
        with pytest.raises(RuntimeError) as theirs:
            nn.Linear(3, 4)(x)
        with pytest.raises(RuntimeError) as ours:
            fnn.Linear(3, 4)(x)
        assert str(ours.value) == str(theirs.value)


def test_feed_forward_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="activation must be callable or one of 'gelu'"):
        fnn.FeedForward(4, 8, activation="swish")


def test_dropout_is_that_of_the_seed_and_hooks_are_heard():
    ff, x = fnn.FeedForward(8, 32, dropout=0.5), torch.randn(3, 8)
    torch.manual_seed(1)
    first = ff(x)
    torch.manual_seed(1)
    assert torch.equal(ff(x), first)
    assert not torch.equal(ff(x), first)
    still, heard = copy.deepcopy(ff).eval()(x), []
    ff.eval().linear1.register_forward_hook(lambda *a: heard.append(1))
    torch.testing.assert_close(ff(x), still)
    assert heard == [1]
