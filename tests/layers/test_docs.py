"""docs/layers.md: its examples run, and the first one's model is right; README.md's runs too."""

import re
from pathlib import Path

import torch

import fasttx

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "layers.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_a_model_of_ones_own_trains_and_generates(capsys):
    names = {}
    exec(EXAMPLES[0], names)
    assert "torch.Size([2, 24])" in capsys.readouterr().out
    lines = EXAMPLES[0].partition("class Small")[2].partition("\n\n\nmodel")[0].splitlines()
    assert len(lines) <= 60
    torch.manual_seed(0)
    model = names["Small"]().train()
    ids = torch.randint(1000, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(model.loss(ids))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    model.eval()
    # Greedy tokens with the cache are those of the whole sequence, read again at every step.
    with torch.no_grad():
        whole = ids[:, :5]
        for _ in range(6):
            logits = model(whole)[:, -1] @ model.embedding.tokens.weight.t()
            whole = torch.cat((whole, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(ids[:, :5], 6), whole)


def test_encoders_of_the_same_parts():
    names = {}
    exec(EXAMPLES[1], names)
    ids, real = torch.randint(1000, (2, 9)), torch.ones(2, 9)
    real[0, 5:] = 0
    for part in ("vaswani", "bert"):
        hidden = names["encoder"](names[part](ids), padding_mask=real)
        assert hidden.isfinite().all() and not hidden[0, 5:].any()


def test_example_of_the_readme():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(next(e for e in examples if "fasttx.nn" in e), names)
    assert names["y"].shape == (2, 64, 256) and not names["y"][1, 24:].any()


def test_every_layer_is_named():
    assert [n for n in fasttx.nn.__all__ if f"`{n}`" not in TEXT] == []
