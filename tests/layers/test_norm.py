"""fasttx.nn's norms beside torch.nn's."""

import inspect

import pytest
import torch
from torch import nn

import fasttx.layers as fnn

from .compare import configurations, same, twin


def _shape(rng):
    dims = rng.randint(1, 3)
    shape = [rng.choice((3, 8, 17, 64, 130)) for _ in range(dims)]
    return [rng.randint(1, 5) for _ in range(rng.randint(0, 2))] + shape, shape


@configurations
def test_layer_norm(rng):
    full, shape = _shape(rng)
    options = {
        "eps": rng.choice((1e-5, 1e-12, 0.1)),
        "elementwise_affine": rng.random() < 0.8,
        "bias": rng.random() < 0.8,
        "dtype": rng.choice((torch.float32, torch.bfloat16, torch.float16)),
    }
    shape = shape[0] if len(shape) == 1 and rng.random() < 0.5 else shape
    ours, theirs = fnn.LayerNorm(shape, **options), nn.LayerNorm(shape, **options)
    twin(ours, theirs)
    x = torch.randn(full, dtype=options["dtype"]) * 2 + 1
    same(ours, theirs, {"input": x})


@configurations
def test_rms_norm(rng):
    full, shape = _shape(rng)
    options = {
        "eps": rng.choice((None, 1e-5, 0.1)),
        "elementwise_affine": rng.random() < 0.8,
        "dtype": rng.choice((torch.float32, torch.bfloat16, torch.float16)),
    }
    ours, theirs = fnn.RMSNorm(shape, **options), nn.RMSNorm(shape, **options)
    twin(ours, theirs)
    same(ours, theirs, {"x": torch.randn(full, dtype=options["dtype"]) * 2})


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_signature_and_representation(name):
    ours, theirs = getattr(fnn, name), getattr(nn, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    assert repr(ours(8)) == repr(theirs(8))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_what_torch_refuses_is_refused_in_its_words(name):
    for make, x in (
        (lambda c: c(8), torch.randn(2, 7)),
        (lambda c: c((2, 8)), torch.randn(8)),
        (lambda c: c(8), torch.ones(2, 8, dtype=torch.int64)),
    ):
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            make(getattr(nn, name))(x)
        with pytest.raises(type(theirs.value)) as ours:
            make(getattr(fnn, name))(x)
        assert str(ours.value) == str(theirs.value)


def test_float64_runs_on_torch():
    x = torch.randn(3, 8, dtype=torch.float64)
    ours, theirs = fnn.LayerNorm(8, dtype=x.dtype), nn.LayerNorm(8, dtype=x.dtype)
    assert torch.equal(ours(x), theirs(x))
