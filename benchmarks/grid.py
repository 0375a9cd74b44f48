"""The grid on which fasttx must never be slower than PyTorch: encoder, decoder and seq2seq shapes.

Batch 1-64, lengths 64-8192 with at most 16384 tokens, head sizes 64 and 128, widths 768, 1024 and
4096, vocabularies of 30522, 50257 and 128256, padding 0, 25, 50 and 75 %, dropout 0 and 0.1, no
bias, ALiBi and T5's. Features are taken one at a time; what one call would need more than
MAX_FLOPS or MAX_BYTES for is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from . import ops
from .ops.attention_case import Case
from .ops.generic import Work

TOKENS = ((1, 64), (8, 64), (64, 64), (1, 512), (8, 512), (1, 2048), (8, 2048), (1, 8192))
ROWS = (1, *dict.fromkeys(b * s for b, s in TOKENS))
WIDTHS = (768, 1024, 4096)
VOCABULARIES = (30522, 50257, 128256)
LAYERS = ((768, 3072), (1024, 4096), (4096, 11008))
MAX_FLOPS = 1e11
MAX_BYTES = 1 << 30


def cases(op: str, dtype: str) -> list[Work | Case]:
    """Every case of an op in one dtype, the small ones first. KeyError for an op without a grid."""
    return sorted(_GRID[op](dtype), key=_size)


def names() -> tuple[str, ...]:
    return tuple(_GRID)


def _size(case: Work | Case) -> float:
    if isinstance(case, Case):
        return case.flops("forward")
    return max((*case.flops.values(), *case.moved.values()), default=0)


def _attention(dtype: str) -> Iterator[Case]:
    features = (
        {},
        {"causal": True},
        {"padding": 0.25},
        {"padding": 0.5},
        {"padding": 0.75},
        {"dropout": 0.1},
        {"bias": "alibi", "causal": True},
        {"bias": "relative"},
    )
    for (batch, length), head_dim, feature in product(TOKENS, (64, 128), features):
        name = "decoder" if feature.get("causal") else "encoder"
        heads = 768 // head_dim
        case = Case(name, batch, heads, length, length, head_dim, dtype, **feature)
        grown = [case]
        if not feature:
            grown.append(replace(case, topology="seq2seq cross", keys=min(512, 2 * length)))
            grown.append(replace(case, topology="decoder", kv_heads=heads // 3, causal=True))
        yield from (c for c in grown if 4 * c.head_dim * _pairs(c) <= MAX_FLOPS)


def _pairs(case: Case) -> int:
    return case.batch * case.heads * case.queries * case.keys


def _attention_decode(dtype: str) -> Iterator[Work]:
    work = ops.find("attention_decode").work
    for batch, keys, (heads, groups, size) in product(
        (1, 8, 64), (64, 512, 2048, 8192), ((12, 12, 64), (32, 8, 128))
    ):
        if 4 * batch * groups * keys * size * 4 <= MAX_BYTES:
            yield work(dtype, batch, heads, groups, 1, keys, size)


def _attention_map(dtype: str) -> Iterator[Work]:
    yield from ops.find("attention_map").full_cases((dtype,))


def _add_norm(dtype: str) -> Iterator[Work]:
    work = ops.find("add_norm").work
    for rows, columns in product(ROWS, WIDTHS):
        yield work(rows, columns, dtype)
        yield work(rows, columns, dtype, "rms")
        yield work(rows, columns, dtype, dropout=0.1)


def _softmax(dtype: str) -> Iterator[Work]:
    module = ops.find("softmax")
    for rows, columns in product(ROWS, (64, 512, 2048)):
        yield module.plain((rows, columns), dtype)
        yield module.plain((rows, columns), dtype, log=True)
    for batch, length in TOKENS:
        if 4 * batch * 12 * length * length * 4 <= MAX_BYTES:
            for kind in ("bool", "float"):
                yield module.masked((batch, 12, length, length), dtype, kind)


def _linear(dtype: str) -> Iterator[Work]:
    work = ops.find("linear").work
    for rows, (width, hidden) in product(ROWS, LAYERS):
        if 6 * rows * width * hidden <= MAX_FLOPS:
            yield work(rows, width, width, dtype)
            yield work(rows, width, hidden, dtype, "gelu")
            yield work(rows, hidden, width, dtype, residual=True)
            yield work(rows, width, 3 * width, dtype, transposed=True)


def _ffn(dtype: str) -> Iterator[Work]:
    work = ops.find("ffn").work
    for rows, (width, hidden) in product(ROWS, LAYERS):
        if 12 * rows * width * hidden <= MAX_FLOPS:
            sizes = (width, hidden, width)
            yield work(rows, dtype, sizes=sizes)
            yield work(rows, dtype, dropout=0.1, sizes=sizes)
            yield work(rows, dtype, "silu", gate=True, sizes=sizes)
            yield work(rows, dtype, transposed=True, sizes=sizes)


def _cross_entropy(dtype: str) -> Iterator[Work]:
    work = ops.find("cross_entropy").work
    for rows, classes in product(ROWS, VOCABULARIES):
        if 3 * 4 * rows * classes <= MAX_BYTES:
            yield work(rows, classes, dtype)


def _linear_cross_entropy(dtype: str) -> Iterator[Work]:
    work = ops.find("linear_cross_entropy").work
    for rows, width, classes, labels in product(ROWS, WIDTHS[:2], VOCABULARIES, (1.0, 0.15)):
        if 6 * rows * width * classes <= MAX_FLOPS and labels * rows >= 1:
            yield work(rows, width, classes, dtype, labels)


def _embed(dtype: str) -> Iterator[Work]:
    work = ops.find("embed").work
    for (batch, length), columns, dropout in product(((1, 1), *TOKENS), WIDTHS[:2], (0.0, 0.1)):
        yield work(batch, length, dtype, dropout, columns=columns)


def _rope(dtype: str) -> Iterator[Work]:
    work = ops.find("rope").work
    for (batch, length), (heads, groups, size) in product(
        ((1, 1), *TOKENS), ((12, 12, 64), (32, 8, 128))
    ):
        for form in ("", "interleaved", "in place"):
            yield work(dtype, batch, heads, groups, length, size, form=form, goal=None)


def _sample(dtype: str) -> Iterator[Work]:
    module = ops.find("sample")
    for rows, classes, filters in product((1, 8, 64), VOCABULARIES, module.FILTERS):
        yield module.work(rows, classes, dtype, filters)


_GRID = {
    "attention": _attention,
    "attention_decode": _attention_decode,
    "attention_map": _attention_map,
    "add_norm": _add_norm,
    "softmax": _softmax,
    "linear": _linear,
    "ffn": _ffn,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "embed": _embed,
    "rope": _rope,
    "sample": _sample,
}
