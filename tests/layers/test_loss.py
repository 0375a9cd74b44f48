"""fasttx.nn.CrossEntropyLoss beside torch's."""

import inspect

import pytest
import torch
from torch import nn

import fasttx.layers as fnn

from .compare import configurations, same


@configurations
def test_cross_entropy(rng):
    classes = rng.choice((2, 7, 33, 300))
    shape = [rng.randint(1, 6) for _ in range(rng.randint(0, 3))]
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    options = {
        "weight": torch.rand(classes, dtype=dtype) + 0.1 if rng.random() < 0.4 else None,
        "reduction": rng.choice(("mean", "sum", "none")),
        "label_smoothing": rng.choice((0.0, 0.1, 1.0)),
    }
    logits = torch.randn([*shape[:1], classes, *shape[1:]], dtype=dtype) * 3
    if shape and rng.random() < 0.2:
        target = torch.rand(logits.shape, dtype=dtype).softmax(1)
    else:
        options["ignore_index"] = rng.choice((-100, 1, 5))
        # The first row counts: a mean over none is nan.
        target = torch.randint(classes, shape)
        target.view(-1)[1:][torch.rand(target.numel() - 1) < 0.3] = options["ignore_index"]
        target.clamp_(max=classes - 1)
        target.view(-1)[0] = 0
    ours, theirs = fnn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    same(ours, theirs, {"input": logits}, {"target": target})


def test_signature_state_and_representation():
    for of in (lambda c: c, lambda c: c.forward):
        assert inspect.signature(of(fnn.CrossEntropyLoss)) == inspect.signature(
            of(nn.CrossEntropyLoss)
        )
    weight = torch.ones(3)
    ours, theirs = fnn.CrossEntropyLoss(weight), nn.CrossEntropyLoss(weight)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        (torch.randn(4, 3), torch.tensor([0, 1, 2, 3])),
        (torch.randn(4, 3), torch.tensor([0, 1])),
        (torch.randn(4, 3), torch.tensor([0, 1, 2, 0], dtype=torch.bool)),
    ],
)
def test_what_torch_refuses_is_refused_in_its_words(logits, target):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        nn.CrossEntropyLoss()(logits, target)
    with pytest.raises(type(theirs.value)) as ours:
        fnn.CrossEntropyLoss()(logits, target)
    assert str(ours.value) == str(theirs.value)
