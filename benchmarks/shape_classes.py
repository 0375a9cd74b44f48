"""Shape classes: which calls of an inner op are alike enough that one is the fastest for all.

Data. A class is the dtypes of some arguments, some sizes, each in its octave (n is alike with the
numbers that have as many binary digits: 1, 2-3, 4-7, ..., 512-1023), what flags and numbers say,
which optional arguments are there, and how matrices lie in memory. What an op's class does not name
(a bias, which gradients are needed) makes no difference to which kernel is the fastest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fasttx.choice import layout, size
from fasttx.kernel import short


@dataclass(frozen=True)
class Class:
    """Names of arguments: dtypes and layout of tensors, sizes as fasttx/choice.py has them, values
    numbers and flags that count as they are, present tensors of which it counts whether they are
    there. free: outputs, by number, that backends may give differently: what only backwards read.
    """

    dtypes: tuple[str, ...]
    sizes: tuple[str, ...]
    values: tuple[str, ...] = ()
    present: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    free: tuple[int, ...] = ()


_PRODUCT = Class(("x",), ("x.0", "x.1", "weight.0"), ("activation",), (), ("weight",))
_FFN = Class(
    ("x",), ("x.0", "x.1", "w1.0", "w2.0"), ("activation",), ("w_gate", "seed"), ("w1", "w2")
)
_ATTENTION = Class(
    ("q",),
    ("q.0", "q.1", "q.2", "q.3", "k.1", "k.2"),
    ("left", "right", "lower_right"),
    ("mask", "slopes", "table", "cu_q", "seed"),
)
_SOFTMAX = Class(("x",), ("x.rows", "x.-1"), ("causal", "log"), ("mask",))
_NORM = Class(("x",), ("x.rows", "x.-1"), ("rms",), ("residual", "weight", "seed"))
_LOSS = Class(("logits",), ("target.numel", "logits.-1"), ("reduction",), ("weight",))
_HEAD = Class(("x",), ("x.0", "x.1", "weight.0"), ("reduction", "need"), ("class_weight",))
_EMBED = Class(
    ("token_weight",),
    ("input_ids.numel", "token_weight.1"),
    ("norm",),
    ("position_weight", "segment_weight", "seed"),
)


def _rope(q: str, k: str) -> Class:
    return Class((q,), tuple(f"{q}.{dim}" for dim in range(4)), ("interleaved",), (k,))


CLASSES: Mapping[str, Class] = {
    "linear_fwd": Class(
        _PRODUCT.dtypes, _PRODUCT.sizes, ("activation", "keep"), ("residual",), _PRODUCT.layout
    ),
    "linear_bwd": _PRODUCT,
    "ffn_fwd": Class(_FFN.dtypes, _FFN.sizes, ("activation", "keep"), _FFN.present, _FFN.layout),
    "ffn_bwd": _FFN,
    "attention_fwd": _ATTENTION,
    "attention_bwd": _ATTENTION,
    "attention_decode_fwd": Class(
        ("q",), ("q.0", "q.1", "q.2", "q.3", "k_cache.1", "k_cache.2"), (), ("block_table", "table")
    ),
    "attention_map_fwd": Class(
        ("q",),
        (*_ATTENTION.sizes, "heads.0", "rows.0"),
        ("left", "right", "lower_right", "pool"),
        ("heads", "rows", "mask", "slopes", "table"),
    ),
    "softmax_fwd": _SOFTMAX,
    "softmax_out": _SOFTMAX,
    "softmax_bwd": _SOFTMAX,
    "add_norm_fwd": _NORM,
    "add_norm_bwd": _NORM,
    "cross_entropy_fwd": replace(_LOSS, free=(1, 2)),
    "cross_entropy_bwd": _LOSS,
    "linear_cross_entropy_fwd": _HEAD,
    "linear_cross_entropy_bwd": _HEAD,
    "embed_fwd": _EMBED,
    "embed_bwd": _EMBED,
    "sample_fwd": Class(("logits",), ("logits.0", "logits.1"), ("greedy",)),
    "rope_fwd": _rope("q", "k"),
    "rope_bwd": _rope("dq_out", "dk_out"),
    "rope_inplace": _rope("q", "k"),
}


def octave(n: int) -> list[int]:
    """The least and the greatest number of n's class."""
    if n < 1:
        return [n, n]
    low = 1 << (n.bit_length() - 1)
    return [low, 2 * low - 1]


def describe(op: str, args: tuple, at: Mapping[str, int]) -> dict[str, Any]:
    """The class of a call as an entry of a table of choices has it. KeyError for an op without
    classes."""
    found = CLASSES[op]

    def of(name: str):
        return args[at[name]]

    tensors = {n: of(n) for n in (*found.dtypes, *found.layout)}
    entry: dict[str, Any] = {
        "dtypes": {n: short(tensors[n].dtype) for n in found.dtypes},
        "sizes": {
            key: octave(size(of(key.partition(".")[0]), key.partition(".")[2]))
            for key in found.sizes
            if of(key.partition(".")[0]) is not None
        },
        "given": {n: [of(n)] for n in found.values} | {n: of(n) is not None for n in found.present},
        "layout": {n: layout(tensors[n]) for n in found.layout},
    }
    return {key: value for key, value in entry.items() if value}


def words(entry: Mapping[str, Any]) -> str:
    """A class for people."""
    sizes = (
        f"{key}={low}" if low == high else f"{key}={low}-{high}"
        for key, (low, high) in entry.get("sizes", {}).items()
    )
    given = (
        f"{name}={value[0]}" if isinstance(value, list) else name if value else ""
        for name, value in entry.get("given", {}).items()
    )
    how = (f"{name} in {way}" for name, way in entry.get("layout", {}).items() if way != "rows")
    return " ".join(filter(None, (*entry.get("dtypes", {}).values(), *sizes, *given, *how)))
