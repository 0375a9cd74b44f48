"""The one harness: an op on a backend in a dtype, outputs and every gradient, against fp64.

The rule: an output's largest error against fp64 is at most `OUTPUT_FACTOR` times that of plain
PyTorch in the same dtype, a gradient's at most `GRADIENT_FACTOR` times, plus one rounding of the
dtype at the scale of the result. Outputs are handed to kernels filled with NaN between guard bands;
inputs are compared with a copy afterwards.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from . import op as contract

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
_GUARD = 64
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded")


@dataclass
class Result:
    """Outputs and gradients by name, in fp64; `error` after a comparison is the worst error over
    its allowance."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        return {**self.outputs, **{f"d{n}": g for n, g in self.gradients.items()}}


def run(
    function: Callable,
    inputs: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor],
    wanted: tuple[str, ...] = (),
    names: tuple[str, ...] = ("out",),
) -> Result:
    """Call function(**inputs), then differentiate sum(output * upstream) over the outputs named in
    upstream, for `wanted` inputs."""
    leaves = {
        n: t.detach().requires_grad_(n in wanted) if t.is_floating_point() else t
        for n, t in inputs.items()
    }
    outputs = function(**leaves)
    outputs = dict(zip(names, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
    used = [n for n in upstream if n in outputs and outputs[n].requires_grad]
    gradients = {}
    if wanted and used:
        given = [upstream[n].to(outputs[n].dtype) for n in used]
        grads = torch.autograd.grad([outputs[n] for n in used], [leaves[n] for n in wanted], given)
        gradients = dict(zip(wanted, grads, strict=True))
        for name, grad in gradients.items():
            got, leaf = (grad.shape, grad.dtype), leaves[name]
            assert got == (leaf.shape, leaf.dtype), f"d{name}: {got}"
    return Result(
        {n: t.detach().double() for n, t in outputs.items()},
        {n: g.double() for n, g in gradients.items()},
    )


def check(
    function: Callable,
    gold: Callable,
    plain: Callable | tuple[Callable, ...],
    inputs: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    wanted: tuple[str, ...] = (),
    names: tuple[str, ...] = ("out",),
    keep: tuple[str, ...] = (),
    layouts: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Hold `function` in `dtype` against `gold` in fp64, with `plain` in `dtype` as the yardstick
    (of several, the one with the larger error); every error over its allowance.

    inputs: fp64 masters; floating ones are rounded to dtype first (those in `keep` stay as they
    are), so that gold sees the same numbers. layouts: input name, or "d" + output name for an
    upstream gradient, to one of LAYOUTS. Raises AssertionError naming the tensor, its error and
    what was allowed.
    """
    layouts = layouts or {}
    rounded = {
        n: t.to(dtype) if t.is_floating_point() and n not in keep else t for n, t in inputs.items()
    }
    if dtype is torch.float64:
        wide = rounded
    else:
        wide = {
            n: t.double() if t.is_floating_point() and n not in keep else t
            for n, t in rounded.items()
        }
    ours_in = {n: lay_out(t, layouts.get(n, "contiguous")) for n, t in rounded.items()}
    copies = {n: t.clone() for n, t in ours_in.items()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shapes = gold(**wide)
    shapes = dict(zip(names, shapes if isinstance(shapes, tuple) else (shapes,), strict=True))
    upstream, laid = {}, {}
    for name, t in shapes.items():
        g = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        if layouts.get("d" + name) == "expanded":
            g = g.sum_to_size([1] * g.dim()).expand(g.shape) if g.numel() else g
        g = g.to(dtype)
        upstream[name] = g
        laid[name] = (
            g
            if layouts.get("d" + name) == "expanded"
            else lay_out(g, layouts.get("d" + name, "contiguous"))
        )
    expected = run(gold, wide, {n: g.double() for n, g in upstream.items()}, wanted, names).named()
    plains = plain if isinstance(plain, tuple) else (plain,)
    yardsticks = [run(p, rounded, upstream, wanted, names).named() for p in plains]
    with guarded_outputs():
        got = run(function, ours_in, laid, wanted, names).named()
    for name, copy in copies.items():
        assert torch.equal(ours_in[name].nan_to_num(), copy.nan_to_num()), (
            f"input {name} was changed"
        )
    errors = {}
    for name, value in expected.items():
        is_gradient = name.startswith("d") and name[1:] in wanted
        target = inputs[name[1:]].dtype if is_gradient and name[1:] in keep else dtype
        factor = GRADIENT_FACTOR if is_gradient else OUTPUT_FACTOR
        yardstick = max((y[name] for y in yardsticks), key=lambda y: _largest(y - value))
        errors[name] = compare(name, got[name], value, yardstick, target, factor)
    return errors


def compare(
    name: str, got: Tensor, gold: Tensor, plain: Tensor, dtype: torch.dtype, factor: float
) -> float:
    """max |got - gold| over its allowance; AssertionError above 1, or where NaN and infinities
    differ."""
    assert got.shape == gold.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(gold.shape)}"
    )
    if not gold.numel():
        return 0.0
    finite = gold.isfinite()
    same = torch.where(gold.isnan(), got.isnan(), got == gold) | finite
    assert same.all(), f"{name}: {int((~same).sum())} values that should be infinite or NaN are not"
    assert got[finite].isfinite().all(), (
        f"{name}: {int((~got[finite].isfinite()).sum())} of {got.numel()} values are not finite"
    )
    if not finite.any():
        return 0.0
    scale = gold[finite].abs().max().item()
    error = (got - gold)[finite].abs().max().item()
    yard = _largest((plain - gold)[finite])
    allowed = factor * yard + torch.finfo(dtype).eps * max(scale, torch.finfo(dtype).tiny)
    assert error <= allowed, (
        f"{name}: error {error:.3g}, allowed {allowed:.3g} (plain PyTorch {yard:.3g}, scale "
        f"{scale:.3g})"
    )
    return error / allowed


def _largest(error: Tensor) -> float:
    return error.nan_to_num(0, 0, 0).abs().max().item() if error.numel() else 0.0


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "contiguous" or t.dim() == 0:
        return t.contiguous()
    if layout == "transposed":
        return (
            t.transpose(-3, -2).contiguous().transpose(-3, -2)
            if t.dim() >= 3
            else t.t().contiguous().t()
        )
    if layout == "sliced":
        wide = t.new_zeros([n + 3 for n in t.shape])
        wide[tuple(slice(1, 1 + n) for n in t.shape)] = t
        return wide[tuple(slice(1, 1 + n) for n in t.shape)]
    if layout == "strided":
        wide = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1] + 1))
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if layout == "expanded":
        return t[:1].expand(t.shape)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """Kernels get outputs filled with NaN (the largest value for integers) between guard bands that
    must stay as they are."""
    bands: list[Tensor] = []

    def hook(outputs: tuple) -> tuple:
        return tuple(_guarded(t, bands) for t in outputs)

    before, contract.allocation_hook = contract.allocation_hook, hook
    try:
        yield
    finally:
        contract.allocation_hook = before
    for band in bands:
        assert torch.equal(band, torch.full_like(band, 77)), "a kernel wrote outside its output"


def _guarded(t: Tensor, bands: list[Tensor]) -> Tensor:
    if not t.numel():
        return t
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    storage = t.new_full((extent + 2 * _GUARD,), 77)
    bands += [storage[:_GUARD], storage[_GUARD + extent :]]
    inner = storage[_GUARD : _GUARD + extent]
    inner.fill_(torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)
    return inner.as_strided(t.shape, t.stride())


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[tuple]]:
    """The inner ops called inside, as (op, args, backend): what opcheck wants."""
    calls: list[tuple] = []
    original = contract.Op.__call__

    def record(self, *args, backend=None):
        calls.append((self, args, backend))
        return original(self, *args, backend=backend)

    contract.Op.__call__ = record
    try:
        yield calls
    finally:
        contract.Op.__call__ = original


@contextlib.contextmanager
def on_device(device: torch.device | str) -> Iterator[None]:
    """Inner ops run on `device`, whatever tensors the caller has: arguments go there in their exact
    memory layout, outputs and mutated arguments come back in theirs. So tests written for the CPU
    hold a GPU's kernels to the same cases. Calls that are traced or transformed are left alone."""
    original = contract.Op.__call__

    def elsewhere(self, *args, backend=None):
        tensors = [a for a in args if isinstance(a, Tensor)]
        if torch.compiler.is_compiling() or not all(map(_is_plain, tensors)):
            return original(self, *args, backend=backend)
        moved = [_moved(a, device) if isinstance(a, Tensor) else a for a in args]
        outputs = original(self, *moved, backend=backend)
        for argument, ours, there in zip(
            self.overload._schema.arguments, args, moved, strict=False
        ):
            if isinstance(ours, Tensor) and argument.alias_info and argument.alias_info.is_write:
                ours.untyped_storage().copy_(there.untyped_storage())
        if outputs is None:
            return None
        home = tensors[0].device
        if isinstance(outputs, Tensor):
            return _moved(outputs, home)
        return tuple(_moved(t, home) for t in outputs)

    contract.Op.__call__ = elsewhere
    try:
        yield
    finally:
        contract.Op.__call__ = original


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and not is_functorch_wrapped_tensor(t)


def _moved(t: Tensor, device: torch.device | str) -> Tensor:
    """A copy on the device of t with all of its storage, so with its strides and offset."""
    everything = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    there = everything.to(device, copy=True)
    return there.as_strided(t.shape, t.stride(), t.storage_offset())


def relative_rms(got: Tensor, gold: Tensor) -> float:
    """sqrt(mean (got - gold)^2 / mean gold^2)."""
    return ((got.double() - gold).square().mean() / gold.square().mean()).sqrt().item()
