"""softmax and attention by PyTorch's own kernels for the CPU: a backend, "torch", where these were
measured to be faster (fasttx/choice.py).

The calling conventions and the meaning are those of fasttx/ops/softmax.py and attention.py; what
PyTorch's kernels would do otherwise (a row of -inf, values that are not finite behind a causal
band, windows) is left to the reference.
"""

import torch

from . import attention as reference
from . import softmax as softmax_reference


def softmax_fwd(out, x, mask, scale, causal, lower_right, log, wide):
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        z = x if scale == 1 else x * scale
        if z.data_ptr() == out.data_ptr():
            z = x.clone()
        own = torch.ops.aten._log_softmax if log else torch.ops.aten._softmax
        own.out(z, -1, False, out=out)
        # PyTorch's NaN for a row of -inf is 0 here.
        if out[..., :1].isnan().any():
            nothing = (z == -torch.inf).all(-1, keepdim=True)
            out.masked_fill_(nothing, -torch.inf if log else 0)


def softmax_bwd(dx, dmask, dout, out, x, mask, scale, causal, lower_right, log, need):
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        # What is hidden takes part in nothing here: -inf in a logarithm, NaN behind a 0.
        if not (out if log else dout).isfinite().all():
            args = (dout, out, x, mask, scale, causal, lower_right, log, need)
            return softmax_reference.softmax_bwd(dx, dmask, *args)
        if need & 1:
            if log:
                torch.ops.aten._log_softmax_backward_data.out(dout, out, -1, x.dtype, out=dx)
            else:
                torch.ops.aten._softmax_backward_data.out(dout, out, -1, x.dtype, grad_input=dx)
            if scale != 1:
                dx.mul_(scale)


def _plain(q, k, v, left, right, lower_right) -> bool | None:
    """is_causal of PyTorch's kernel; None where it cannot do the call, or would let through what
    the band hides."""
    if left >= 0 or right > 0 or q.shape[3] != v.shape[3] or not (q.numel() and k.numel()):
        return None
    if right < 0:
        return False
    if lower_right and q.shape[2] != k.shape[2]:
        return None
    return True if all(bool(t.isfinite().all()) for t in (q, k, v)) else None


def _grouped(q, t):
    """Keys or values, one head for each of q's."""
    return t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def attention_fwd(out, lse, q, k, v, *rest):
    scale, (left, right, lower_right) = rest[8], rest[11:14]
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        causal = _plain(q, k, v, left, right, lower_right)
        if causal is None:
            return reference.attention_fwd(out, lse, q, k, v, *rest)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, _grouped(q, k), _grouped(q, v), 0.0, causal, scale=scale
        )
        out.copy_(found[0])
        lse.copy_(found[1])


def attention_bwd(dq, dk, dv, dmask, dtable, dout, dlse, q, k, v, out, lse, *rest):
    scale, (left, right, lower_right), need = rest[8], rest[11:14], rest[-1]
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        causal = _plain(q, k, v, left, right, lower_right)
        if causal is None or (causal and not dout.isfinite().all()):
            return reference.attention_bwd(
                dq, dk, dv, dmask, dtable, dout, dlse, q, k, v, out, lse, *rest
            )
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, _grouped(q, k), _grouped(q, v), out, lse, 0.0, causal, scale=scale
        )
        for bit, (grad, new) in enumerate(zip((dq, dk, dv), found, strict=True)):
            if need >> bit & 1:
                if new.shape != grad.shape:
                    B, G, T, D = grad.shape
                    new = new.view(B, G, -1, T, D).sum(2, dtype=torch.float32)
                grad.copy_(new)
