"""fnn.Embedding beside torch's, and TransformerEmbedding beside its formula."""

import inspect
import math

import pytest
import torch
from torch import nn

import fasttx.layers as fnn

from .compare import configurations, same, twin


@configurations
def test_embedding(rng):
    rows, width = rng.choice((1, 2, 50)), rng.choice((1, 8, 33))
    options = {
        "padding_idx": rng.choice((None, 0, -1)),
        "scale_grad_by_freq": rng.random() < 0.1,
        "dtype": rng.choice((torch.float32, torch.bfloat16)),
    }
    ours, theirs = fnn.Embedding(rows, width, **options), nn.Embedding(rows, width, **options)
    twin(ours, theirs)
    shape = [rng.randint(1, 6) for _ in range(rng.randint(0, 3))]
    ids = torch.randint(rows, shape, dtype=rng.choice((torch.int64, torch.int32)))
    same(_Ids(ours, ids), _Ids(theirs, ids), {"x": torch.zeros((), dtype=options["dtype"])})


class _Ids(nn.Module):
    def __init__(self, inner, ids):
        super().__init__()
        self.inner, self.ids = inner, ids

    def forward(self, x):
        return self.inner(self.ids) + x


class Plain(nn.Module):
    """tokens, positions, segments, norm of torch's parts."""

    def __init__(self, like: fnn.TransformerEmbedding):
        super().__init__()
        dtype, (rows, width) = like.tokens.weight.dtype, like.tokens.weight.shape
        self.tokens = nn.Embedding(rows, width, like.tokens.padding_idx, dtype=dtype)
        self.scale, self.fixed = like.scale, None
        if isinstance(like.positions, fnn.LearnedPositions):
            self.positions = nn.Embedding(*like.positions.weight.shape, dtype=dtype)
            self.reserved = like.positions.reserved
        elif like.positions is not None:
            self.fixed = like.positions.weight
        if like.segments is not None:
            self.segments = nn.Embedding(*like.segments.weight.shape, dtype=dtype)
        if like.norm is not None:
            kind = nn.LayerNorm if isinstance(like.norm, nn.LayerNorm) else nn.RMSNorm
            self.norm = kind(width, eps=like.norm.eps, dtype=dtype)

    def forward(self, x, input_ids, segment_ids=None, offset=0):
        out = self.tokens(input_ids) * self.scale
        places = torch.arange(input_ids.shape[1]) + offset
        if hasattr(self, "positions"):
            out = out + self.positions(places + self.reserved)
        elif self.fixed is not None:
            out = out + self.fixed[places].to(out.dtype)
        if hasattr(self, "segments"):
            first = torch.zeros_like(places)
            out = out + self.segments(first if segment_ids is None else segment_ids)
        return (self.norm(out) if hasattr(self, "norm") else out) + 0 * x


class _Ours(nn.Module):
    def __init__(self, inner):
        super().__init__()
        for name, part in inner.named_children():
            self.add_module(name, part)
        self.inner = [inner]

    def forward(self, x, **given):
        return self.inner[0](**given) + 0 * x


@configurations
def test_transformer_embedding(rng):
    width, dtype = rng.choice((4, 16, 33)), rng.choice((torch.float32, torch.bfloat16))
    kind = rng.choice(("none", "learned", "sinusoidal"))
    positions = {
        "none": lambda: None,
        "learned": lambda: fnn.LearnedPositions(
            20, width, reserved=rng.choice((0, 2)), dtype=dtype
        ),
        "sinusoidal": lambda: fnn.SinusoidalPositions(width, count=20, dtype=dtype),
    }[kind]()
    norm = rng.choice((None, fnn.LayerNorm, fnn.RMSNorm))
    ours = fnn.TransformerEmbedding(
        11,
        width,
        positions=positions,
        segments=rng.choice((0, 2)),
        norm=None if norm is None else norm(width, eps=1e-5, dtype=dtype),
        scale=rng.choice((1.0, math.sqrt(width))),
        padding_idx=rng.choice((None, 3)),
        dtype=dtype,
    )
    theirs = Plain(ours)
    wrapped = _Ours(ours)
    twin(wrapped, theirs)
    B, S = rng.randint(1, 3), rng.randint(1, 6)
    given = {"input_ids": torch.randint(11, (B, S)), "offset": rng.choice((0, 5))}
    if ours.segments is not None and rng.random() < 0.7:
        given["segment_ids"] = torch.randint(2, (B, S))
    same(wrapped, theirs, {"x": torch.zeros((), dtype=dtype)}, given)


def test_signature_and_errors():
    assert inspect.signature(fnn.Embedding) == inspect.signature(nn.Embedding)
    assert repr(fnn.Embedding(4, 2, padding_idx=1)) == repr(nn.Embedding(4, 2, padding_idx=1))
    for ids in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([0.5])):
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            nn.Embedding(4, 2)(ids)
        with pytest.raises(type(theirs.value)) as ours:
            fnn.Embedding(4, 2)(ids)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError, match="padding_positions needs padding_idx"):
        fnn.TransformerEmbedding(4, 2, padding_positions=True)


def test_positions_past_a_learned_table_are_named_and_sines_go_on():
    ids = torch.zeros(1, 5, dtype=torch.int64)
    learned = fnn.TransformerEmbedding(3, 4, positions=fnn.LearnedPositions(4, 4))
    with pytest.raises(ValueError, match="4 positions"):
        learned(ids)
    sines = fnn.TransformerEmbedding(3, 4, positions=fnn.SinusoidalPositions(4, count=4))
    assert sines(ids).shape == (1, 5, 4)
    assert "positions.weight" not in sines.state_dict()


def test_positions_of_padding_are_robertas():
    ids = torch.tensor([[5, 6, 1, 1], [7, 8, 9, 1]])
    model = fnn.TransformerEmbedding(
        12, 4, positions=fnn.LearnedPositions(8, 4), padding_idx=1, padding_positions=True
    )
    places = torch.tensor([[2, 3, 1, 1], [2, 3, 4, 1]])
    torch.testing.assert_close(model(ids), model.tokens(ids) + model.positions.weight[places])


def test_sinusoids_that_grew_in_inference_mode_train():
    positions = fnn.SinusoidalPositions(16, count=8)
    embedding = fnn.TransformerEmbedding(50, 16, positions=positions)
    ids = torch.randint(0, 50, (2, 20))
    with torch.inference_mode():
        embedding(ids)
    embedding(ids).sum().backward()
    assert embedding.tokens.weight.grad is not None
