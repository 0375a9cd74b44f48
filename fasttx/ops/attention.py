"""out = softmax(softcap(scale * q k^T) + bias + mask) v, for encoders, decoders and
cross-attention.

Shapes: B batch, H heads, G key/value heads (H % G == 0, head h reads h // (H // G)), S queries, T
keys, D head size. q [B,H,S,D], k [B,G,T,D], v [B,G,T,Dv]; out [B,H,S,Dv] in the memory order
[B,S,H,Dv]; lse [B,H,S] float32, the natural log of the sum of exp of the final logits, -inf for a
row with no visible key, whose out and gradients are 0.

Below the door flags are plain scalars. Pair (i, j) is visible only if i + off - left <= j <= i +
off + right, off = T - S where lower_right, else 0, and -1 is unbounded. mask [B|1,H|1,S|1,T|1] is
bool (True visible) or additive (exactly -inf hidden). slopes [B|1,H] and positions [B|1,T] are
ALiBi; table [buckets,H] with lut int32 [2M+1] is a relative bias, the bucket of d = j - (i + T - S
+ bias_shift) at lut[clamp(d) + M]. cu_q, cu_k int32 [n+1] bound the packed sequences of B = 1. seed
int64 [1] is the key of the dropout bits (fasttx/reference/philox.py). need: dq 1, dk 2, dv 4, dmask
8, dtable 16; with ORDERED dq has the same bits every time also where a kernel is faster without.
Residuals q, k, v, out, lse: any backend's backward follows any backend's forward.
"""

import torch
from torch import Tensor

from ..autograd import differentiable
from ..op import Kernel, Needs, Op
from ._attention_checks import checked
from ._position_bias import ALiBi, RelativePositionBias

__all__ = ["ALiBi", "RelativePositionBias", "attention", "attention_bwd", "attention_fwd"]


@Op
def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, slopes: Tensor | None, positions: Tensor | None, table: Tensor | None,
    lut: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, seed: Tensor | None,
    scale: float, softcap: float, dropout_p: float,
    left: int, right: int, lower_right: bool, bias_shift: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, S, _ = q.shape
    out = q.new_empty((B, S, H, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((B, H, S), dtype=_statistics(q))


@Op
def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, slopes: Tensor | None, positions: Tensor | None, table: Tensor | None,
    lut: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, seed: Tensor | None,
    scale: float, softcap: float, dropout_p: float,
    left: int, right: int, lower_right: bool, bias_shift: int, need: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = [
        torch.empty_like(t) if need >> bit & 1 else q.new_empty(0)
        for bit, t in enumerate((q, k, v))
    ]
    for bit, t in ((3, mask), (4, table)):
        grads.append(t.new_empty(t.shape) if t is not None and need >> bit & 1 else q.new_empty(0))
    return tuple(grads)


def _statistics(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


attention_fwd.backward = attention_bwd
ORDERED = 32
_HEADS = {"q.3": (1, 256), "v.3": (0, 256)}
_HALF = (torch.bfloat16, torch.float16)
_ABSENT = ("slopes", "table", "cu_q", "seed", "softcap")
for _op in (attention_fwd, attention_bwd):
    _triton = f"fasttx.kernels.attention:{_op.name}"
    _own = Needs(by_name=True, absent=("dlse", *_ABSENT) if _op is attention_bwd else _ABSENT)
    _reference = Kernel("reference", f"fasttx.reference.attention:{_op.name}", Needs(dtypes=None))
    _op.kernels(
        cpu=[
            Kernel("cpu", f"native:{_op.name}_cpu", Needs(sizes=_HEADS)),
            Kernel(
                "triton", _triton, Needs(sizes=_HEADS, env=("TRITON_INTERPRET", "1"), by_name=True)
            ),
            Kernel("torch", f"fasttx.reference.torch_own:{_op.name}", _own),
            _reference,
        ],
        cuda=[
            Kernel("triton", _triton, Needs(sizes=_HEADS, sm=80)),
            Kernel("cuda", f"native:{_op.name}_cuda", Needs(_HALF, sizes=_HEADS, sm=80)),
            _reference,
        ],
    )


def _forward(tensors, rest, scalars, backend):
    q, k, v, mask, table = tensors
    return attention_fwd(q, k, v, mask, *rest[:2], table, *rest[2:], *scalars, backend=backend)


def _backward(upstream, tensors, rest, outputs, scalars, need, backend):
    (dout, dlse), (q, k, v, mask, table), (out, lse) = upstream, tensors, outputs
    dout = torch.zeros_like(out) if dout is None else dout
    inputs = (q, k, v, out, lse, mask, *rest[:2], table, *rest[2:])
    if torch.are_deterministic_algorithms_enabled():
        need |= ORDERED
    return attention_bwd(dout, dlse, *inputs, *scalars, need, backend=backend)


def _math(tensors, rest, scalars):
    from ..reference.attention import attention_math

    q, k, v, mask, table = tensors
    return attention_math(q, k, v, mask, *rest[:2], table, *rest[2:], *scalars)


_attention = differentiable("attention", _forward, _backward, _math)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool | str = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    position_bias: ALiBi | RelativePositionBias | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention, a superset of torch.nn.functional.scaled_dot_product_attention: put in its place
    it gives the same answers.

    logits = softcap(scale * query key^T) + position_bias + attn_mask, hidden pairs removed;
    out = dropout(softmax(logits)) value.

    Args:
        query: [..., H, S, D], float32, bfloat16, float16 (float64 by the reference). Any leading
            dimensions, any strides.
        key, value: [..., G, T, D] and [..., G, T, Dv] with H % G == 0; query head h reads key head
            h // (H // G).
        attn_mask: bool (True: visible) or floating (added; exactly -inf hides, any finite value is
            only a number), of any shape that broadcasts to [..., H, S, T]. It is read through its
            strides, never expanded; its gradient has its shape.
        dropout_p: in [0, 1); applied whenever above 0, as in PyTorch. Rounded to a multiple of
            1/65536.
        is_causal: False; True or "upper_left": key j <= query i; "lower_right": j <= i + T - S, as
            in cached decoding.
        scale: finite; None is 1 / sqrt(D).
        enable_gqa: accepted for compatibility; grouped heads are inferred.
        position_bias: ALiBi(...) or RelativePositionBias(...), computed inside the kernel.
        window: (left, right), each an int >= 0 or None (unbounded), inclusive: query i sees keys i
            - left .. i + right, shifted by T - S where is_causal="lower_right".
        softcap: c > 0 turns the scaled product x into c * tanh(x / c), before bias and mask.
        cu_seqlens: int32 or int64 [n + 1], or a pair for query and key: query, key and value hold n
            sequences one after the other in [1, H, total, D] (or [H, total, D]); causal, bias,
            window and dropout restart in each.
        return_lse: also return the log-sum-exp of the logits, float32 [..., H, S], differentiable.
        seed: the key of the dropout bits, an int or an int64 tensor of one element; None draws it
            from torch's generator.
        backend: None chooses; "cpu", "cuda", "triton", "torch" (PyTorch's own, where it means the
            same) or "reference" runs that or raises with every kernel's reason.

    Returns:
        out [..., H, S, Dv] in query's dtype, or (out, lse). A row with no visible key gives 0 with
        gradient 0 and lse -inf. What is hidden never reaches an output or a gradient, NaN and
        infinity included.

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything runs.
        NotImplementedError: no kernel supports the call, with each kernel's reason.

    Sources: Dao, arXiv 2307.08691 (the algorithm); Press et al., 2108.12409 (ALiBi); Raffel et al.,
    1910.10683 (relative bias).
    """
    tensors, rest, scalars, leading = checked(
        query, key, value, attn_mask, dropout_p, is_causal, scale,
        position_bias, window, softcap, cu_seqlens, seed, backend,
    )  # fmt: skip
    if backend == "torch":
        return _torch(tensors, rest, scalars, leading, return_lse)
    out, lse = _attention(tensors, rest, scalars, backend, () if return_lse else (1,))
    if leading is not None:
        out, lse = (
            out.reshape(leading + out.shape[-2:]),
            lse.reshape(leading + lse.shape[-1:]),
        )
    return (out, lse) if return_lse else out


def _torch(
    tensors: tuple, rest: tuple, scalars: tuple, leading: tuple | None, return_lse: bool
) -> Tensor:
    """PyTorch's own attention, where it means the same: a kernel of the inner op, or on a GPU and
    in float64 with its own autograd."""
    q, k, v, mask, table = tensors
    inner = q.device.type == "cpu" and q.dtype is not torch.float64
    slopes, _, _, cu_q, _, _ = rest
    scale, softcap, dropout_p, left, right, lower_right, _ = scalars
    causal = right == 0 and left < 0 and (not lower_right or q.shape[2] == k.shape[2])
    refusals = [
        name
        for name, given in (
            ("position_bias", table is not None or slopes is not None),
            ("cu_seqlens", cu_q is not None),
            ("softcap", softcap > 0),
            ("window or lower_right", not causal and (left >= 0 or right >= 0)),
            ("attn_mask with is_causal", mask is not None and causal and not inner),
            ("dropout_p (its bits are torch's own)", dropout_p > 0),
            ("return_lse", return_lse),
        )
        if given
    ]
    if refusals:
        raise NotImplementedError(
            f"fasttx.attention: backend='torch' does not support {', '.join(refusals)}"
        )
    if inner:
        out = _attention(tensors, rest, scalars, "torch", (1,))[0]
    else:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out if leading is None else out.reshape(leading + out.shape[-2:])
