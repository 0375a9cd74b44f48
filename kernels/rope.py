"""Rotary position embedding in Triton: forward, backward and in place are one kernel.

A program holds the angles of BLOCK_S positions and turns some heads of q, or of k, with them.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .launch import Call, device_arch

ELEMENTS = 1024  # pairs of a tile held in registers
HEADS = tl.constexpr(4)  # turned by one program


@dataclass(frozen=True)
class RopeFeatures:
    """Everything the kernel is specialized on; passed as one constexpr."""

    D: int
    ROTARY: int
    BLOCK_S: int
    BLOCK_R: int  # pairs, a power of two
    BLOCK_P: int  # columns that pass through, a power of two; 0: none, or in place
    INTERLEAVED: bool
    ADJOINT: bool
    TWICE: bool  # one angle for both of a pair


@triton.jit
def _pairs(base, stride, s, i, inside, F: tl.constexpr):
    """Both columns of BLOCK_R pairs of rows s as fp32."""
    HALF: tl.constexpr = F.ROTARY // 2
    rows = base + s.to(tl.int64)[:, None] * stride[0]
    if F.INTERLEAVED:
        BLOCK_S: tl.constexpr = F.BLOCK_S
        BLOCK_R: tl.constexpr = F.BLOCK_R
        j = tl.arange(0, 2 * BLOCK_R)
        live = inside & (j < F.ROTARY)[None, :]
        x = tl.load(rows + (j.to(tl.int64) * stride[1])[None, :], mask=live, other=0.0)
        a, b = tl.split(tl.reshape(x.to(tl.float32), [BLOCK_S, BLOCK_R, 2]))
    else:
        live = inside & (i < HALF)[None, :]
        a = tl.load(rows + (i.to(tl.int64) * stride[1])[None, :], mask=live, other=0.0)
        at = (i + HALF).to(tl.int64) * stride[1]
        b = tl.load(rows + at[None, :], mask=live, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _angles(base, stride, s, i, inside, F: tl.constexpr):
    HALF: tl.constexpr = F.ROTARY // 2
    if F.TWICE:
        at = (i.to(tl.int64) * stride[1])[None, :]
        rows = base + s.to(tl.int64)[:, None] * stride[0]
        t = tl.load(rows + at, mask=inside & (i < HALF)[None, :], other=0.0).to(tl.float32)
        return t, t
    else:
        return _pairs(base, stride, s, i, inside, F)


@triton.jit
def _turn(out, out_stride, x, x_stride, batch, first, heads, s, i, inside, angles,
          F: tl.constexpr):  # fmt: skip
    """Heads first .. first + HEADS - 1 of one batch row."""
    HALF: tl.constexpr = F.ROTARY // 2
    cos_a, cos_b, sin_a, sin_b = angles
    for h in range(first, tl.minimum(first + HEADS, heads)):
        head = batch * 0 + h
        base = x + batch * x_stride[0] + head * x_stride[1]
        to = out + batch * out_stride[0] + head * out_stride[1]
        stride = (x_stride[2], x_stride[3])
        a, b = _pairs(base, stride, s, i, inside, F)
        if F.ADJOINT:
            turned_a = a * cos_a + b * sin_b
            turned_b = b * cos_b - a * sin_a
        else:
            turned_a = a * cos_a - b * sin_a
            turned_b = b * cos_b + a * sin_b
        rows = to + s.to(tl.int64)[:, None] * out_stride[2]
        if F.INTERLEAVED:
            BLOCK_S: tl.constexpr = F.BLOCK_S
            BLOCK_R: tl.constexpr = F.BLOCK_R
            j = tl.arange(0, 2 * BLOCK_R)
            both = tl.reshape(tl.join(turned_a, turned_b), [BLOCK_S, 2 * BLOCK_R])
            at = (j.to(tl.int64) * out_stride[3])[None, :]
            live = inside & (j < F.ROTARY)[None, :]
            tl.store(rows + at, both.to(out.dtype.element_ty), mask=live)
        else:
            live = inside & (i < HALF)[None, :]
            at = (i.to(tl.int64) * out_stride[3])[None, :]
            tl.store(rows + at, turned_a.to(out.dtype.element_ty), mask=live)
            at = ((i + HALF).to(tl.int64) * out_stride[3])[None, :]
            tl.store(rows + at, turned_b.to(out.dtype.element_ty), mask=live)
        if F.BLOCK_P > 0:
            p = F.ROTARY + tl.arange(0, F.BLOCK_P)
            live = inside & (p < F.D)[None, :]
            at = (p.to(tl.int64) * stride[1])[None, :]
            rest = tl.load(base + s.to(tl.int64)[:, None] * stride[0] + at, mask=live)
            at = (p.to(tl.int64) * out_stride[3])[None, :]
            tl.store(rows + at, rest, mask=live)


@triton.jit(do_not_specialize=["S", "q_heads", "k_heads", "tiles"])
def rope_kernel(
    q_out, k_out, q, k, cos, sin, q_out_stride, k_out_stride, q_stride, k_stride, cos_stride,
    sin_stride, S, q_heads, k_heads, tiles, F: tl.constexpr,
):  # fmt: skip
    q_groups = tl.cdiv(q_heads, HEADS)
    groups = q_groups + tl.cdiv(k_heads, HEADS)
    program = tl.program_id(0)
    group = program % groups
    batch = (program // groups // tiles).to(tl.int64)
    s = program // groups % tiles * F.BLOCK_S + tl.arange(0, F.BLOCK_S)
    i = tl.arange(0, F.BLOCK_R)
    inside = (s < S)[:, None]
    stride = (cos_stride[1], cos_stride[2])
    cos_a, cos_b = _angles(cos + batch * cos_stride[0], stride, s, i, inside, F)
    stride = (sin_stride[1], sin_stride[2])
    sin_a, sin_b = _angles(sin + batch * sin_stride[0], stride, s, i, inside, F)
    angles = (cos_a, cos_b, sin_a, sin_b)
    if group < q_groups:
        _turn(q_out, q_out_stride, q, q_stride, batch, group * HEADS, q_heads, s, i, inside,
              angles, F)  # fmt: skip
    else:
        _turn(k_out, k_out_stride, k, k_stride, batch, (group - q_groups) * HEADS, k_heads, s, i,
              inside, angles, F)  # fmt: skip


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def rope_calls(arch, q_out, k_out, q, k, cos, sin, rotary, interleaved, adjoint, in_place=False):
    """The kernel call of one rotation; k may be None."""
    B, H, S, D = q.shape
    G = 0 if k is None else k.shape[1]
    if k is None:
        k, k_out = q, q_out
    block_r = max(1, _next_power_of_2(rotary // 2))
    block_p = 0 if in_place or rotary == D else _next_power_of_2(D - rotary)
    most = 4096 if arch == "interpreter" else ELEMENTS
    features = RopeFeatures(
        D=D,
        ROTARY=rotary,
        BLOCK_S=max(1, min(_next_power_of_2(S), most // max(block_r, block_p // 2))),
        BLOCK_R=block_r,
        BLOCK_P=block_p,
        INTERLEAVED=interleaved,
        ADJOINT=adjoint,
        TWICE=2 * cos.shape[2] == rotary and rotary > 0,
    )
    tiles = triton.cdiv(S, features.BLOCK_S)
    groups = triton.cdiv(H, HEADS.value) + triton.cdiv(G, HEADS.value)
    strides = (t.stride() for t in (q_out, k_out, q, k))
    angle_strides = (
        (0 if t.shape[0] == 1 else t.stride(0), t.stride(1), t.stride(2)) for t in (cos, sin)
    )
    args = (q_out, k_out, q, k, cos, sin, *strides, *angle_strides, S, H, G, tiles)
    yield Call(rope_kernel, (B * tiles * groups if D else 0,), args, features, 4, 1)


def rope_fwd(q_out, k_out, q, k, *rest):
    """Fill q_out and k_out (where k is given)."""
    for call in rope_calls(device_arch(q.device), q_out, k_out, q, k, *rest, False):
        call.run()


def rope_bwd(dq, dk, dq_out, dk_out, *rest):
    """Fill dq and dk (where dk_out is given)."""
    for call in rope_calls(device_arch(dq.device), dq, dk, dq_out, dk_out, *rest, True):
        call.run()


def rope_inplace(q, k, *rest):
    """Turn q and k (where given) where they lie."""
    for call in rope_calls(device_arch(q.device), q, k, q, k, *rest, False, True):
        call.run()
