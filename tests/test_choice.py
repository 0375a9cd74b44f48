"""What was measured to be the fastest goes first, where its measurement says so."""

import json
import re

import pytest
import torch

import fasttx
from fasttx import choice
from fasttx.ops.linear import linear_fwd

X, W = torch.randn(6, 8).bfloat16(), torch.randn(4, 8).bfloat16()
ENTRY = {
    "card": "a card",
    "dtype": "bfloat16",
    "sizes": {"x.0": [4, 64], "weight.0": [1, 4]},
    "given": {"activation": [0, 1], "residual": False, "keep": False},
    "backend": "torch",
    "measured": {"ms": {"torch": 0.1, "triton": 0.2}, "commit": "0123456"},
}


@pytest.fixture
def measured(monkeypatch):
    """Sets the entries of linear_fwd."""

    def set(*entries, card="a card"):
        found = choice.read(json.dumps({"linear_fwd": entries}))
        monkeypatch.setattr(choice, "choices", lambda: found)
        monkeypatch.setattr(choice, "card_of", lambda device: card)
        # Calls that go around the table are those of tables without a choice.
        monkeypatch.setattr(linear_fwd, "direct", {})
        monkeypatch.setattr(linear_fwd, "promoted", {})

    return set


def chosen(x=X, weight=W, **options) -> str:
    return fasttx.explain(fasttx.linear, x, weight, **options).chosen("linear_fwd")


def test_the_fastest_goes_first(measured):
    assert chosen() == "cpu"
    measured(ENTRY)
    assert chosen() == chosen(activation="gelu") == "torch"
    torch.testing.assert_close(fasttx.linear(X, W), torch.nn.functional.linear(X, W))
    linear_fwd.direct.clear()
    assert linear_fwd.pick((X, W, None, None, 0, False)).backend == "torch"
    assert linear_fwd.pick((X, W, None, None, 0, False), "cpu").backend == "cpu"


@pytest.mark.parametrize(
    "call",
    [
        {"activation": "relu"},
        {"residual": torch.randn(6, 4).bfloat16()},
        {"x": X[:3]},
        {"weight": torch.randn(5, 8).bfloat16()},
        {"x": X.float(), "weight": W.float()},
        {"x": X.clone().requires_grad_(), "activation": "gelu"},
    ],
)
def test_other_calls_are_as_before(measured, call):
    measured(ENTRY)
    assert chosen(**call) == "cpu"


def test_other_cards_are_as_before(measured):
    measured(ENTRY, card="another card")
    assert chosen() == "cpu"


def test_needs_has_the_last_word(measured):
    measured(ENTRY | {"backend": "cuda", "measured": {"ms": {"cuda": 1.0}}})
    assert chosen() == "cpu"


@pytest.mark.parametrize(
    "change",
    [
        {"measured": {}},
        {"measured": {"ms": {"triton": 0.2}}},
        {"backend": "triton"},
        {"card": None},
    ],
)
def test_an_entry_without_its_measurement_is_an_error(change):
    entry = {k: v for k, v in (ENTRY | change).items() if v is not None}
    with pytest.raises(ValueError, match="must name its card, the times measured there"):
        choice.read(json.dumps({"linear_fwd": [entry]}))


def test_the_committed_data_can_be_read():
    for op, entries in choice.choices().items():
        for entry in entries:
            named = {key.partition(".")[0] for key in entry.get("sizes", {})}
            named |= set(entry.get("given", {}))
            assert named <= set(fasttx.op.OPS[op].at)
            assert entry["backend"] in fasttx.op.OPS[op].backends()
            assert re.fullmatch(r"[0-9a-f]{7,40}", entry["measured"]["commit"])
