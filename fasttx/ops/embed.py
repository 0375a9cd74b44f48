"""out = dropout(norm(scale * token_weight[id] + position_weight[p] + segment_weight[s])).

Shapes: V, P, G rows of the token, position and segment tables, N columns, B sequences of S tokens,
M = B S. Below the door input_ids [B,S] and segment_ids, position_ids [B,S] or None are contiguous
int64; position_ids None: token s stands at start + s; segment_ids None: segment 0. Tables and norm
parameters have any strides, each in float32, bfloat16 or float16. out [B,S,N] has the dtype to
which the tables promote, or float32 where `wide`; stats float32 [2, M] holds mean and rstd of each
row, [1, M] rstd alone for rms, [0, M] without a norm. norm: 0 none, 1 layer, 2 rms
(fasttx/ops/add_norm.py has the formulas). Dropout decides by (flattened row, column): seed int64
[1] is its key (fasttx/reference/philox.py). An id out of range makes its row NaN and no access out
of bounds.

need: dtoken 1, dposition 2, dsegment 4, dnorm_weight 8, dnorm_bias 16. Rows of a table are summed
in float32, in an order given by the ids alone, and rounded once; rows padding_idx of the tokens and
position_padding of the positions get 0 (-1: no such row). The backward reads the tables again:
residuals are the inputs and stats, so any backend's backward follows any backend's forward.
"""

import math
import os

import torch
from torch import Tensor

from ..autograd import Direct, differentiable
from ..op import HALF, Kernel, Needs, Op
from ._checks import (
    FLOATS,
    check_backend,
    check_dropout,
    check_float,
    extremes,
    has_values,
    number,
    seed_tensor,
    short,
)

__all__ = ["embed", "embed_bwd", "embed_fwd", "sinusoidal_positions"]
_KINDS = {"layer": 1, "rms": 2}


@Op
def embed_fwd(
    token_weight: Tensor, position_weight: Tensor | None, segment_weight: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None,
    input_ids: Tensor, segment_ids: Tensor | None, position_ids: Tensor | None,
    seed: Tensor | None,
    start: int, padding_idx: int, position_padding: int, norm: int,
    scale: float, eps: float, dropout_p: float, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = token_weight.dtype
    for t in (position_weight, segment_weight):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    B, S = input_ids.shape
    statistics = torch.float64 if dtype is torch.float64 else torch.float32
    return (
        token_weight.new_empty(
            (B, S, token_weight.shape[1]), dtype=torch.float32 if wide else dtype
        ),
        token_weight.new_empty(((0, 2, 1)[norm], B * S), dtype=statistics),
    )


@Op
def embed_bwd(
    token_weight: Tensor, position_weight: Tensor | None, segment_weight: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, stats: Tensor, dout: Tensor,
    input_ids: Tensor, segment_ids: Tensor | None, position_ids: Tensor | None,
    seed: Tensor | None,
    start: int, padding_idx: int, position_padding: int, norm: int,
    scale: float, dropout_p: float, need: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weights = (token_weight, position_weight, segment_weight, norm_weight, norm_bias)
    return tuple(
        t.new_empty(t.shape) if t is not None and need >> bit & 1 else token_weight.new_empty(0)
        for bit, t in enumerate(weights)
    )


embed_fwd.backward = embed_bwd
for _op in (embed_fwd, embed_bwd):
    _triton = f"fasttx.kernels.embed:{_op.name}"
    _reference = Kernel(
        "reference",
        f"fasttx.reference.embed:{_op.name}",
        Needs(dtypes=None, dtype_of="token_weight"),
    )
    _op.kernels(
        cpu=[
            Kernel("cpu", f"native:{_op.name}_cpu", Needs(dtype_of="token_weight")),
            Kernel(
                "triton",
                _triton,
                Needs(dtype_of="token_weight", env=("TRITON_INTERPRET", "1"), by_name=True),
            ),
            Kernel(
                "torch",
                f"fasttx.reference.torch_own:{_op.name}",
                Needs(dtype_of="token_weight", absent=("seed",), by_name=True),
            ),
            _reference,
        ],
        cuda=[
            Kernel("triton", _triton, Needs(dtype_of="token_weight", sm=80)),
            Kernel("cuda", f"native:{_op.name}_cuda", Needs(HALF, dtype_of="token_weight", sm=80)),
            _reference,
        ],
    )


def _forward(tensors, rest, scalars, backend):
    return embed_fwd(*tensors, *rest, *scalars, backend=backend)


def _backward(upstream, tensors, rest, outputs, scalars, need, backend):
    *places, scale, _, dropout_p, _ = scalars
    dout = upstream[0]
    if dout is None:
        dout = tensors[0].new_zeros((*rest[0].shape, tensors[0].shape[1]))
    return embed_bwd(
        *tensors, outputs[1], dout, *rest, *places, scale, dropout_p, need, backend=backend
    )


def _math(tensors, rest, scalars):
    from ..reference.embed import embed_math

    return embed_math(*tensors, *rest, *scalars)


def _save(tensors, outputs):
    return tensors, (None, outputs[1])


_direct = Direct(embed_fwd, "t0 t1 t2 t3 t4 o1 u0 r0 r1 r2 r3 s0 s1 s2 s3 s4 s6 n")
_embed = differentiable("embed", _forward, _backward, _math, _save, _direct)


def embed(
    input_ids: Tensor,
    token_weight: Tensor,
    position_weight: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_weight: Tensor | None = None,
    *,
    positions: Tensor | str | None = None,
    position_offset: int | Tensor = 0,
    padding_idx: int | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
    kind: str = "layer",
    dropout_p: float = 0.0,
    scale: float = 1.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The first layer of a transformer, in one pass over memory:
    dropout(norm(scale * token_weight[id] + position_weight[position] + segment_weight[segment])).

    Args:
        input_ids: [..., S] integers in [0, V).
        token_weight: [V, N], float32, bfloat16, float16 (float64 by the reference), any strides.
        position_weight: [P, N], learned, or a fixed table (sinusoidal_positions); or None.
        segment_ids: integers in [0, G) that broadcast to input_ids; None is segment 0 everywhere.
        segment_weight: [G, N], or None.
        positions: None: token s of a sequence stands at s. Integers that broadcast to input_ids:
            the positions themselves. "padding": RoBERTa's rule, tokens other than padding_idx count
            padding_idx + 1, padding_idx + 2, ... and padding stands at padding_idx.
        position_offset: added to every position, but for padding's; an int, or integers of the
            shape of input_ids without its last dimension, one a sequence: the length of the cache
            when decoding.
        padding_idx: the row of token_weight that gets no gradient, as in nn.Embedding; with
            positions="padding" that row of position_weight gets none either.
        norm_weight, norm_bias: [N], the scale and shift of the norm, or None; any floating dtype.
        eps: finite, at least 0. There is a norm where norm_weight, norm_bias or eps is given; None
            is 1e-5 then.
        kind: "layer" (LayerNorm) or "rms" (RMSNorm).
        dropout_p: in [0, 1), after the norm; applied whenever above 0. Rounded to a multiple of
            1/65536.
        scale: finite; multiplies the token's row alone (sqrt(N) in the original transformer).
        seed: the key of the dropout bits, an int or an int64 tensor of one element; None draws it
            from torch's generator.
        backend: None chooses; "cpu", "cuda", "triton", "torch" (PyTorch's own kernels on the CPU,
            without dropout) or "reference" runs that or raises with every kernel's reason.

    Returns:
        [..., S, N] in the dtype to which the tables promote; with a norm under CUDA's autocast
        float32, as torch's layer_norm.

    Gradients of tables are dense; rows that no id names are 0. They are summed in float32 in an
    order given by the ids alone: two runs agree in every bit.

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything runs. On
            a GPU ids are not read: one out of range makes its row NaN (FASTTX_CHECK=1 checks them,
            with a sync).
        NotImplementedError: no kernel supports the call, with each kernel's reason.

    Sources: Devlin et al., arXiv 1810.04805 (BERT); Liu et al., 1907.11692 (RoBERTa), whose rule
    for positions is that of fairseq.
    """
    check_backend(backend)
    check_dropout(dropout_p)
    if kind not in _KINDS:
        raise ValueError(f"kind must be 'layer' or 'rms', got {kind!r}")
    if not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf:
        raise number("scale", scale, "a finite number")
    if eps is not None and (not isinstance(eps, (int, float)) or not 0 <= eps < math.inf):
        raise number("eps", eps, "None or a finite number of at least 0")
    tables = _check_tables(token_weight, position_weight, segment_weight, norm_weight, norm_bias)
    ids = _check_ids("input_ids", input_ids, None, token_weight, token_weight.shape[0])
    shape = ids.shape
    if segment_weight is None:
        if segment_ids is not None:
            raise ValueError("segment_ids needs segment_weight, got None")
    elif segment_ids is not None:
        rows = segment_weight.shape[0]
        segment_ids = _check_ids("segment_ids", segment_ids, shape, token_weight, rows)
    elif not segment_weight.shape[0]:
        raise ValueError(f"segment_weight must have a row, got {tuple(segment_weight.shape)}")
    padding_idx = _check_padding(padding_idx, token_weight.shape[0])
    start, position_ids = 0, None
    if position_weight is None:
        if positions is not None:
            raise ValueError("positions needs position_weight, got None")
    else:
        start, position_ids = _positions(
            ids, positions, position_offset, padding_idx, position_weight, token_weight
        )
    norm = 0 if norm_weight is norm_bias is eps is None else _KINDS[kind]
    device = token_weight.device
    wide = (
        norm > 0
        and device.type == "cuda"
        and torch.is_autocast_enabled("cuda")
        and token_weight.dtype is not torch.float64
    )
    flat = tuple(None if t is None else _flat(t) for t in (ids, segment_ids, position_ids))
    out = _embed(
        tables,
        (*flat, seed_tensor(seed, device, "token_weight") if dropout_p else None),
        (
            start, padding_idx, padding_idx if isinstance(positions, str) else -1, norm,
            float(scale), 1e-5 if eps is None else float(eps), float(dropout_p), wide,
        ),
        backend,
        (1,),
    )[0]  # fmt: skip
    return out if len(shape) == 2 else out.reshape(*shape, out.shape[2])


def sinusoidal_positions(
    count: int,
    features: int,
    *,
    base: float = 10000.0,
    interleaved: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The fixed position table of the original transformer, [count, features], for `embed`.

    With w_i = base^(-2i / features), position p has sin(p w_i) and cos(p w_i) in columns 2i and 2i
    + 1; not interleaved (BART, Marian): all sines first, then all cosines. An odd `features` has
    one cosine fewer. Computed in float64 and rounded once. Source: Vaswani et al., arXiv
    1706.03762.
    """
    for name, value in (("count", count), ("features", features)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise number(name, value, "an int of at least 0")
    if not isinstance(base, (int, float)) or not 0 < base < math.inf:
        raise number("base", base, "a finite number above 0")
    pairs = torch.arange((features + 1) // 2, dtype=torch.float64, device=device)
    angles = torch.arange(count, dtype=torch.float64, device=device)[:, None]
    angles = angles * base ** (-2 * pairs / max(1, features))
    columns = (angles.sin(), angles.cos()[:, : features // 2])
    table = angles.new_empty((count, features))
    if interleaved:
        table[:, 0::2], table[:, 1::2] = columns
    else:
        table[:] = torch.cat(columns, 1)
    return table.to(dtype or torch.get_default_dtype())


def _flat(ids: Tensor) -> Tensor:
    """[..., S] as contiguous [B, S]."""
    if ids.dim() == 0:
        return ids.reshape(1, 1)
    return ids.contiguous() if ids.dim() == 2 else ids.reshape(math.prod(ids.shape[:-1]), -1)


def _check_tables(*tables) -> tuple:
    token, dimensions = tables[0], (2, 2, 2, 1, 1)
    if _direct.alike(tables, dimensions):
        return tables
    for name, t, dims in zip(
        ("token_weight", "position_weight", "segment_weight", "norm_weight", "norm_bias"),
        tables,
        dimensions,
        strict=True,
    ):
        if t is None and name != "token_weight":
            continue
        if not isinstance(t, Tensor) or t.dtype not in FLOATS:
            check_float(name, t)
        if t.dim() != dims or t.shape[-1] != token.shape[-1]:
            rows = "" if dims == 1 else f"{name[0].upper().replace('T', 'V').replace('S', 'G')}, "
            width = "N" if t is token else token.shape[-1]
            raise ValueError(f"{name} must have shape ({rows}{width}), got {tuple(t.shape)}")
        if t.device != token.device:
            raise ValueError(
                f"{name} must be on token_weight's device {token.device}, got {t.device}"
            )
        if (t.dtype is torch.float64) != (token.dtype is torch.float64):
            raise TypeError(
                f"{name} must be float64 exactly where token_weight is, got {short(t.dtype)} "
                f"beside {short(token.dtype)}"
            )
    return tables


def _refuse_device(name: str, t: Tensor, token: Tensor) -> None:
    raise ValueError(f"{name} must be on token_weight's device {token.device}, got {t.device}")


def _check_ids(name: str, ids, shape, token: Tensor, rows: int) -> Tensor:
    """ids as int64 of that shape; where they can be read, their values are checked too."""
    ids = _integers(name, ids, token)
    if shape is not None and ids.shape != shape:
        ids = _broadcast(name, ids, shape)
    _check_range(name, ids, rows)
    return ids


def _integers(name: str, t, token: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype.is_floating_point or t.dtype.is_complex or t.dtype is torch.bool:
        raise TypeError(f"{name} must hold integers, got {short(t.dtype)}")
    if t.device != token.device:
        _refuse_device(name, t, token)
    return t if t.dtype is torch.int64 else t.long()


def _broadcast(name: str, t: Tensor, shape: torch.Size) -> Tensor:
    try:
        return t.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to the shape {tuple(shape)} of input_ids, got {tuple(t.shape)}"
        ) from None


def _check_range(name: str, ids: Tensor, rows: int) -> None:
    readable = has_values(ids) or (ids.is_cuda and os.environ.get("FASTTX_CHECK", "0") == "1")
    if not readable or not ids.numel():
        return
    low, high = extremes(ids)
    if low < 0 or high >= rows:
        raise ValueError(f"{name} must be in [0, {rows}), got {low if low < 0 else high}")


def _check_padding(padding_idx, rows: int) -> int:
    if padding_idx is None:
        return -1
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx must be None or an int, got {padding_idx!r}")
    if not -rows <= padding_idx < rows:
        raise ValueError(f"padding_idx must be in [{-rows}, {rows}), got {padding_idx}")
    return padding_idx % rows


def _positions(ids, positions, offset, padding_idx, position_weight, token) -> tuple:
    """(start, position_ids): start alone where token s stands at start + s."""
    rows, S = position_weight.shape[0], ids.shape[-1] if ids.dim() else 1
    if not isinstance(offset, Tensor):
        if isinstance(offset, bool) or not isinstance(offset, int):
            raise TypeError(f"position_offset must be an int or a tensor, got {offset!r}")
        if positions is None:
            if ids.numel() and not 0 <= offset <= rows - S:
                raise ValueError(
                    f"position_offset must be in [0, {rows - S}] ({S} tokens, {rows} positions), "
                    f"got {offset}"
                )
            return offset, None
    else:
        offset = _integers("position_offset", offset, token)
        if offset.shape != ids.shape[:-1]:
            raise ValueError(
                f"position_offset must be an int or have the shape {tuple(ids.shape[:-1])} of "
                f"input_ids without its last dimension, got {tuple(offset.shape)}"
            )
        offset = offset[..., None] if ids.dim() else offset
    if positions is None:
        counted = torch.arange(S, device=ids.device) + offset
        found = counted.expand(ids.shape) if ids.dim() else offset
    elif isinstance(positions, str):
        if positions != "padding":
            raise ValueError(
                f"positions must be None, a tensor of integers or 'padding', got {positions!r}"
            )
        if padding_idx < 0:
            raise ValueError("positions='padding' needs padding_idx, got None")
        used = ids.ne(padding_idx)
        counted = used.cumsum(-1) if ids.dim() else used.long()
        found = (counted + offset) * used + padding_idx
    else:
        found = _broadcast("positions", _integers("positions", positions, token), ids.shape)
        if isinstance(offset, Tensor) or offset:
            found = found + offset
    _check_range("positions", found, rows)
    return 0, found
