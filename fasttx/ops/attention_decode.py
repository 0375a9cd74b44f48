"""out = softmax(softcap(scale * q k^T) + bias) v: the newest S tokens against a long cache; and the
append that puts their keys and values there.

Shapes: B sequences, H heads, G key/value heads (H % G == 0, head h reads h // (H // G)), S queries,
D and Dv head sizes. q [B,H,S,D]; k_cache [B,G,T_max,D] and v_cache [B,G,T_max,Dv], or pages
[pages,G,page,D] that block_table int32 [B,n] lists in order; out [B,H,S,Dv] in the memory order
[B,S,H,Dv]. lengths int32 [B] counts the new tokens too: query i of sequence b stands at position p
= lengths[b] - S + i and key j is visible to it only if start[b] <= j < lengths[b] (start 0 where
None) and p - left <= j <= p + right (-1 unbounded; right is 0 where causal). A query with no
visible key, one before position 0 among them, gives 0. slopes [B|1,H] and positions [B|1,T]
float32 are ALiBi; table [buckets,H] with lut int32 [2M+1] is a relative bias, the bucket of d = j -
p at lut[clamp(d, -M, M) + M].

cache_append_inplace writes token s of k and v [B,G,S,.] at position lengths[b] - S + s, nothing
before position 0. Lengths and pages out of range are refused at the door where their values can be
read; kernels leave such positions alone. Inference only: no gradient.
"""

import functools

import torch
from torch import Tensor

from ..op import HALF, Kernel, Needs, Op
from ._attention_decode_checks import checked_append, checked_decode
from ._position_bias import ALiBi, RelativePositionBias

__all__ = ["attention_decode", "attention_decode_fwd", "cache_append", "cache_append_inplace"]


@Op
def attention_decode_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, start: Tensor | None,
    block_table: Tensor | None, slopes: Tensor | None, positions: Tensor | None,
    table: Tensor | None, lut: Tensor | None,
    scale: float, softcap: float, left: int, right: int,
) -> Tensor:  # fmt: skip
    B, H, S, _ = q.shape
    return q.new_empty((B, S, H, v_cache.shape[3])).transpose(1, 2)


@functools.partial(Op, mutates=("k_cache", "v_cache"))
def cache_append_inplace(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    """Positions lengths - S .. lengths - 1 of both caches are written, nothing else."""


_HEADS = {"q.3": (1, 256), "v_cache.3": (0, 256)}
for _op, _of, _sizes in (
    (attention_decode_fwd, "q", _HEADS),
    (cache_append_inplace, "k_cache", {}),
):
    _triton = f"fasttx.kernels.attention_decode:{_op.name}"
    _reference = Kernel(
        "reference", f"fasttx.reference.attention_decode:{_op.name}", Needs(dtypes=None)
    )
    # An append is PyTorch's own indexing in the reference already.
    _own = []
    if _op is attention_decode_fwd:
        _needs = Needs(
            sizes=_sizes, absent=("block_table", "slopes", "table", "softcap"), by_name=True
        )
        _own = [Kernel("torch", f"fasttx.reference.torch_own:{_op.name}", _needs)]
    _op.kernels(
        cpu=[
            Kernel("cpu", f"native:{_op.name}_cpu", Needs(dtype_of=_of, sizes=_sizes)),
            Kernel(
                "triton",
                _triton,
                Needs(dtype_of=_of, sizes=_sizes, env=("TRITON_INTERPRET", "1"), by_name=True),
            ),
            *_own,
            _reference,
        ],
        cuda=[
            Kernel("triton", _triton, Needs(dtype_of=_of, sizes=_sizes, sm=80)),
            Kernel("cuda", f"native:{_op.name}_cuda", Needs(HALF, _of, _sizes, sm=80)),
            _reference,
        ],
    )


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    cache_start: Tensor | None = None,
    block_table: Tensor | None = None,
    is_causal: bool = True,
    position_bias: ALiBi | RelativePositionBias | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention of the newest tokens to a cache of keys and values, split over the keys so that
    one sequence keeps the whole machine at work. Inference only.

    logits = softcap(scale * q k^T) + position_bias, hidden pairs removed; out = softmax(logits) v.

    Args:
        q: [B, H, S, D], the queries of the newest S tokens; float32, bfloat16, float16 (float64 by
            the reference), any strides.
        k_cache, v_cache: [B, G, T_max, D] and [B, G, T_max, Dv] with H % G == 0, or with
            block_table [pages, G, page, D] and [pages, G, page, Dv]; q's dtype (under autocast q
            is cast to theirs), any strides. The keys of the newest tokens are already there: see
            fasttx.cache_append.
        cache_lengths: int32 [B], the positions in use, the newest tokens counted. Query i stands at
            cache_lengths - S + i.
        cache_start: int32 [B], the first position in use (left padding); None is 0.
        block_table: int32 [B, n]: page i of sequence b holds its positions i * page .. (i + 1) *
            page - 1. Entries beyond the length are not read.
        is_causal: True: a query sees keys up to its own position. False: all in use.
        position_bias: ALiBi(...), its positions [T] or [B, T] with T = T_max or n * page; or
            RelativePositionBias(...) by the distance of the positions.
        window: (left, right), each an int >= 0 or None (unbounded), inclusive: keys p - left .. p +
            right of a query at position p.
        scale: finite; None is 1 / sqrt(D).
        softcap: c > 0 turns the scaled product x into c * tanh(x / c), before the bias.
        backend: None chooses; "cpu", "cuda", "triton", "torch" (PyTorch's SDPA on the CPU, without
            pages, bias and softcap) or "reference" runs that or raises with every kernel's reason.

    Returns:
        out [B, H, S, Dv] in q's dtype. A query with no visible key gives 0. What is hidden never
        reaches the output, NaN and infinity included. The bits are the same run to run; on a CPU
        they depend neither on the number of threads nor on the other sequences.

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything runs;
            for an input that requires grad too. The values of cache_lengths, cache_start and
            block_table are checked for CPU tensors; on a GPU kernels stay in bounds.
        NotImplementedError: no kernel supports the call, with each kernel's reason.

    Sources: Dao et al., crfm.stanford.edu/2023/10/12/flashdecoding.html (the split over keys); Kwon
    et al., arXiv 2309.06180 (pages).
    """
    arguments = checked_decode(
        q, k_cache, v_cache, cache_lengths, cache_start, block_table, is_causal, position_bias,
        window, scale, softcap, backend,
    )  # fmt: skip
    return attention_decode_fwd(*arguments, backend=backend)


def cache_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Write the keys and values of the newest S tokens at positions cache_lengths - S ..
    cache_lengths - 1 of the caches, in place.

    Args:
        k_cache, v_cache: [B, G, T_max, D] and [B, G, T_max, Dv], or pages, as in
            fasttx.attention_decode; must not require grad. Their version counters are bumped.
        k, v: [B, G, S, D] and [B, G, S, Dv] in the caches' dtype (cast to it under autocast), in
            memory of their own; any strides.
        cache_lengths: int32 [B], the new tokens counted already. Tokens before position 0, the left
            padding of a shorter row, are not written.
        block_table: int32 [B, n], as in fasttx.attention_decode. No page may be listed twice for
            the positions written.
        backend: None chooses; "cpu", "cuda", "triton" or "reference" runs that or raises with every
            kernel's reason.

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything is
            written.
        NotImplementedError: no kernel supports the call, with each kernel's reason.
    """
    arguments = checked_append(k_cache, v_cache, k, v, cache_lengths, block_table, backend)
    cache_append_inplace(*arguments, backend=backend)
    if not torch.compiler.is_compiling():
        for cache in (k_cache, v_cache):
            if not cache.is_inference():
                torch.autograd.graph.increment_version(cache)
