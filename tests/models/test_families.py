"""Every architecture, loaded from a folder that transformers wrote, against transformers: our fp32
error from its fp64 is at most 1.5 times its own (with sdpa or eager attention, which two differ by
as much)."""

import copy
import random

import pytest
import torch

from fasttx import models

from ..integrations.hf_models import exactly, hold, rms
from .random_models import ARCHITECTURES, batch, fill_padding, model, shown

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
QUICK, ALL = 2, 40
BATCHES = 4  # of a model: one alone is a handful of numbers, whose error is luck


def cases():
    for name in ARCHITECTURES:
        for seed in range(ALL):
            marks = () if seed < QUICK else pytest.mark.slow
            yield pytest.param(name, seed, marks=marks, id=f"{name}-{seed}")


def results(theirs, given) -> dict:
    """Our names of what a transformers model gives."""
    with exactly(theirs), torch.no_grad():
        out = theirs(**given)
    found = {}
    if "start_logits" in out:
        found["logits"] = torch.stack((out.start_logits, out.end_logits), -1)
    elif "logits" in out:
        found["logits"] = out.logits
    else:
        found["hidden"] = out.last_hidden_state
        if "pooler_output" in out and out.pooler_output is not None:
            found["pooled"] = out.pooler_output
    return found


@pytest.mark.parametrize(("name", "seed"), list(cases()))
def test_outputs(name, seed, tmp_path):
    rng = random.Random(f"{name} {seed}")
    theirs, family = model(name, rng)
    theirs.save_pretrained(tmp_path)
    ours = models.from_pretrained(tmp_path)
    assert ours.config.family == family and not ours.training
    eager = copy.deepcopy(theirs)
    eager.set_attn_implementation("eager")
    exact = copy.deepcopy(eager).double()
    found = {}
    for _ in range(BATCHES):
        given = fill_padding(batch(name, rng), theirs.config.pad_token_id)
        with torch.no_grad():
            out = ours(**given)
        plain, other, gold = (results(m, given) for m in (theirs, eager, exact))
        for key, value in gold.items():
            four = (getattr(out, key), plain[key], other[key], value)
            found.setdefault(key, []).append([shown(t, given).flatten() for t in four])
    for key, parts in found.items():
        got, *yards, gold = (torch.cat(part) for part in zip(*parts, strict=True))
        yard = max(yards, key=lambda y, gold=gold: rms(y.double() - gold))
        hold(f"{name} {key}", got, yard, gold)
