"""Rotary position embedding in plain PyTorch, with the calling convention of fasttx/ops/rope.py."""

import torch
from torch import Tensor


def turned(x: Tensor, interleaved: bool) -> Tensor:
    """(-x_b, x_a) in the place of each pair (x_a, x_b)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def each(angles: Tensor, rotary: int, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """cos or sin as [B|1, 1, S, rotary], one for each column."""
    angles = angles.to(dtype)[:, None]
    if angles.shape[-1] == rotary:
        return angles
    return angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)


def rope_math(x, cos, sin, rotary, interleaved, adjoint=False, compute=None) -> Tensor:
    """x [B,H,S,D] rotated, differentiable; with adjoint the transposed rotation. compute: the dtype
    of every step, fp32 where None (fp64 for fp64)."""
    dtype = compute or torch.promote_types(x.dtype, torch.float32)
    cos, sin = (each(t, rotary, interleaved, dtype) for t in (cos, sin))
    head, rest = x[..., :rotary].to(dtype), x[..., rotary:].to(dtype)
    if adjoint:
        head = head * cos - turned(head * sin, interleaved)
    else:
        head = head * cos + turned(head, interleaved) * sin
    return torch.cat((head, rest), -1)


def _fill(outputs, inputs, rest, adjoint):
    with torch.autocast(inputs[0].device.type, enabled=False), torch.no_grad():
        for out, x in zip(outputs, inputs, strict=True):
            if x is not None:
                out.copy_(rope_math(x, *rest, adjoint=adjoint))


def rope_fwd(q_out, k_out, q, k, *rest):
    _fill((q_out, k_out), (q, k), rest, False)


def rope_bwd(dq, dk, dq_out, dk_out, *rest):
    _fill((dq, dk), (dq_out, dk_out), rest, True)


def rope_inplace(q, k, *rest):
    _fill((q, k), (q, k), rest, False)
