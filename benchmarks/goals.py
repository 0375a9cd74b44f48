"""The speed goals of attention on a CPU with avx512_bf16, as data.

Ratios are to ``F.scaled_dot_product_attention`` of torch 2.13 on one thread. ``must`` is what
has to hold, ``aim`` what is hoped for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .ops.attention_case import Case


@dataclass(frozen=True)
class Goal:
    """``rows``: (case, direction) pairs that must each reach ``must`` times SDPA's speed."""

    what: str
    rows: tuple[tuple[Case, str], ...]
    must: float | None
    aim: float | None
    isa: str | None = None


@dataclass(frozen=True)
class CostGoal:
    """Rate per visible pair with a feature, as a share of the plain kernel's: at least ``must``."""

    what: str
    plain: Case
    feature: Case
    direction: str
    must: float


@dataclass(frozen=True)
class ErrorGoal:
    """Median over seeds of the relative RMS error, at most ``must`` times SDPA's."""

    case: Case
    must: float


@dataclass(frozen=True)
class MemoryGoal:
    """Peak memory above the inputs must grow like S: at most ``must`` times from S to 4 S."""

    case: Case
    direction: str
    must: float = 5.0


def _case(topology: str, shape: tuple[int, int, int, int], dtype: str, **features) -> Case:
    batch, heads, size, head_dim = shape
    return Case(topology, batch, heads, size, size, head_dim, dtype, layout="bhsd", **features)


def _long(dtype: str, direction: str, head_dims: tuple[int, ...]) -> tuple[tuple[Case, str], ...]:
    heads = {512: 12, 2048: 4, 4096: 2}
    return tuple(
        (_case(topology, (1, heads[size], size, d), dtype, causal=causal), direction)
        for d in head_dims
        for size in heads
        for topology, causal in (("encoder", False), ("decoder", True))
    )


def _short(dtype: str, direction: str) -> tuple[tuple[Case, str], ...]:
    return ((_case("encoder", (8, 12, 128, 64), dtype), direction),)


def _step(dtype: str, **features) -> tuple[tuple[Case, str], ...]:
    return ((_case("encoder", (4, 12, 512, 64), dtype, **features), "step"),)


RATIOS = (
    Goal("bf16 forward, S >= 512", _long("bf16", "forward", (64, 128)), 2.3, 3.0),
    Goal("bf16 forward, (8,12,128,64)", _short("bf16", "forward"), 2.5, 3.8),
    Goal("bf16 backward, S >= 512, D 64", _long("bf16", "backward", (64,)), 2.1, 2.8),
    Goal("bf16 backward, S >= 512, D 128", _long("bf16", "backward", (128,)), 1.8, 2.2),
    Goal("bf16 backward, (8,12,128,64)", _short("bf16", "backward"), 5.0, 7.0),
    Goal("fp32 forward, S >= 512", _long("fp32", "forward", (64, 128)), 1.25, 1.45),
    Goal("fp32 backward, S >= 512", _long("fp32", "backward", (64, 128)), 1.25, 1.45),
    Goal("fp32 forward, (8,12,128,64)", _short("fp32", "forward"), None, None),
    Goal("fp32 backward, (8,12,128,64)", _short("fp32", "backward"), None, None),
    Goal("bf16 dropout 0.1, forward + backward", _step("bf16", dropout=0.1), 4.0, 6.0),
    Goal("fp32 dropout 0.1, forward + backward", _step("fp32", dropout=0.1), 2.5, 3.2),
    Goal("bf16 trainable position bias, step", _step("bf16", bias="relative"), 3.0, 4.0),
    Goal("fp32 trainable position bias, step", _step("fp32", bias="relative"), 1.7, 2.1),
)

FORCED = tuple(
    Goal(
        f"bf16 without bf16 instructions (avx2), {direction}",
        (
            (_case("encoder", (8, 12, 128, 64), "bf16"), direction),
            (_case("encoder", (1, 12, 512, 64), "bf16"), direction),
            (_case("decoder", (1, 4, 2048, 64), "bf16", causal=True), direction),
        ),
        1.2,
        1.5,
        isa="avx2",
    )
    for direction in ("forward", "backward")
)


def _costs():
    shapes = {128: (8, 12, 128, 64), 512: (4, 12, 512, 64), 2048: (2, 3, 2048, 64)}
    for dtype in ("bf16", "fp32"):
        for size, shape in shapes.items():
            plain = _case("encoder", shape, dtype)
            for name, features in (("padding", {"padding": 0.25}), ("causal", {"causal": True})):
                for direction in ("forward", "backward"):
                    what = f"{dtype} {name} {direction}, S {size}"
                    feature = replace(plain, **features)
                    yield CostGoal(what, plain, feature, direction, 0.7 if size < 512 else 0.9)


COSTS = tuple(_costs())

ERRORS = tuple(
    ErrorGoal(_case("decoder" if causal else "encoder", shape, dtype, causal=causal), limit)
    for dtype, limits in (("fp32", (1.5, 2.0)), ("bf16", (1.0, 1.0)))
    for shape, causal, limit in (
        ((1, 2, 128, 64), False, limits[0]),
        ((1, 2, 512, 64), False, limits[0]),
        ((1, 2, 512, 128), True, limits[0]),
        ((1, 1, 2048, 64), False, limits[1]),
        ((1, 1, 2048, 64), True, limits[1]),
        ((1, 1, 4096, 64), False, limits[1]),
        ((1, 1, 4096, 128), True, limits[1]),
    )
)
SEEDS = 20

MEMORY_SIZES = (2048, 8192)
MEMORY = tuple(
    MemoryGoal(_case("encoder", (1, 2, MEMORY_SIZES[0], 64), dtype, **features), direction)
    for dtype, features, directions in (
        ("bf16", {}, ("forward", "step")),
        ("fp32", {}, ("forward", "step")),
        ("bf16", {"dropout": 0.1}, ("step",)),
        ("bf16", {"padding": 0.25}, ("step",)),
        ("bf16", {"bias": "relative"}, ("step",)),
        ("fp32", {"bias": "relative", "dropout": 0.1}, ("step",)),
    )
    for direction in directions
)
