"""fasttx.nn's softmaxes beside torch's."""

import inspect

import pytest
import torch
from torch import nn

import fasttx.layers as fnn

from .compare import configurations, same


@configurations
def test_softmax(rng):
    name = rng.choice(("Softmax", "LogSoftmax"))
    shape = [rng.choice((2, 5, 33)) for _ in range(rng.randint(1, 4))]
    dim = rng.randrange(-len(shape), len(shape))
    x = torch.randn(shape, dtype=rng.choice((torch.float32, torch.bfloat16, torch.float16))) * 4
    same(getattr(fnn, name)(dim), getattr(nn, name)(dim), {"input": x})


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_signature_representation_and_errors(name):
    ours, theirs = getattr(fnn, name), getattr(nn, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert repr(ours(1)) == repr(theirs(1))
    for dim, x in ((2, torch.randn(2, 3)), (0, torch.ones(3, dtype=torch.int64))):
        with pytest.raises(Exception) as refused:  # noqa: PT011
            theirs(dim)(x)
        with pytest.raises(type(refused.value)) as too:
            ours(dim)(x)
        assert str(too.value) == str(refused.value)
