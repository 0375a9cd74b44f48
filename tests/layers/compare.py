"""A layer beside its torch class: the same state and inputs, outputs and every gradient against
fp64.

The yardstick is torch's own error in the same dtype, plus what a few roundings of the inputs and
parameters change in fp64 (a norm of nearly equal values makes much of little, in torch by luck
less), plus a rounding of the largest gradient (a sum that cancels exactly in torch, the gradient of
a query that sees one key, cancels to a rounding in a kernel that sums in another order).
"""

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from fasttx.testing import compare

QUICK, ALL = 20, 200
FACTOR = 3.0
# Roundings by which a neighbour is off, as many as a value has behind it in the middle of a layer:
# with one, 3 of 2700 cases in bf16 fail, where a relu's input changes its sign (over 60 seeds
# torch's own error has outliers of 0.7 there; test_bf16_error_is_no_larger_than_torchs: medians).
NEIGHBOURS, ROUNDINGS = 2, 4


def configurations(function):
    """Runs function(rng) for ALL seeds, the first QUICK of them in the quick suite."""
    seeds = [
        pytest.param(seed, marks=() if seed < QUICK else pytest.mark.slow) for seed in range(ALL)
    ]

    @pytest.mark.parametrize("seed", seeds)
    def test(seed):
        torch.manual_seed(seed)
        function(random.Random(f"{function.__name__} {seed}"))

    test.__name__, test.__doc__ = function.__name__, function.__doc__
    return test


def twin(ours: nn.Module, theirs: nn.Module) -> None:
    """Two modules of different values get one state, which fits both ways."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.5)
            if p.dim() > 1:
                p.mul_(2 / p.shape[-1] ** 0.5)
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    named = [dict(m.named_parameters()) for m in (ours, theirs)]
    assert list(named[0]) == list(named[1])
    assert all(
        torch.equal(named[0][n], named[1][n]) and named[0][n].dtype is named[1][n].dtype
        for n in named[0]
    )


def same(
    ours: nn.Module, theirs: nn.Module, inputs: dict, options: dict | None = None, shown=None
) -> None:
    """ours(**inputs, **options) against theirs. inputs: tensors, the floating ones differentiated.
    shown: bool, the places of the output (a tensor) that mean something; others get no upstream
    gradient and are not compared."""
    options = options or {}
    dtype = next(t.dtype for t in inputs.values() if t.is_floating_point())
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    wider = {
        n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for n, t in options.items()
    }
    gold = run(copy.deepcopy(theirs).double(), wide, wider, shown)
    eps = torch.finfo(dtype).eps
    moved = [
        run(*_moved(copy.deepcopy(theirs).double(), wide, ROUNDINGS * eps), wider, shown)
        for _ in range(NEIGHBOURS)
    ]
    plain = run(theirs, inputs, options, shown)
    got = run(ours, inputs, options, shown)
    largest = max(_largest(value) for _, value in gold if value is not None)
    for i, (name, value) in enumerate(gold):
        yard, mine = plain[i][1], got[i][1]
        assert plain[i][0] == got[i][0] == name
        if value is None:
            assert yard is None and mine is None, name
            continue
        assert mine.dtype is yard.dtype, f"{name}: {mine.dtype}, torch {yard.dtype}"
        far = max(_largest(near[i][1] - value) for near in moved)
        yard = (yard.double() - value).abs() + far + eps * largest / FACTOR
        compare(name, mine.double(), value, value + yard, dtype, FACTOR)


def _largest(t: Tensor) -> float:
    return t.abs().nan_to_num(0, 0, 0).max().item() if t.numel() else 0.0


def _moved(module: nn.Module, inputs: dict, eps: float):
    """The same with every parameter and input off by about eps of itself."""

    def off(t):
        return t * (1 + eps * torch.randn_like(t)) if t.is_floating_point() else t

    with torch.no_grad():
        for p in module.parameters():
            p.copy_(off(p))
        return module, {n: off(t) for n, t in inputs.items()}


def run(module, inputs, options, shown):
    torch.manual_seed(7)
    leaves = {
        n: t.detach().clone().requires_grad_() if t.is_floating_point() else t
        for n, t in inputs.items()
    }
    outputs = module(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    total = 0
    found = []
    for i, out in enumerate(outputs):
        if out is None:
            found.append((f"out{i}", None))
            continue
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        if shown is not None:
            upstream, out = upstream * shown, torch.where(shown, out, 0)
        found.append((f"out{i}", out.detach()))
        total = total + (out.double() * upstream.double()).sum()
    given = {**leaves, **{f"parameter {n}": p for n, p in module.named_parameters()}}
    given = {n: t for n, t in given.items() if t.is_floating_point() and t.requires_grad}
    if total.requires_grad:
        grads = torch.autograd.grad(total, list(given.values()), allow_unused=True)
        found += [(f"d {n}", g) for n, g in zip(given, grads, strict=True)]
    return found
