"""torch.nn.functional.scaled_dot_product_attention, whatever kernel it picks.

It has no word for a position bias: it gets the whole bias as a mask made beforehand, a leaf that
requires grad where the bias is trainable, so building it (and reducing its gradient to a table)
costs it nothing here.
"""

import torch
import torch.nn.functional as F

from ..ops.attention_case import bias_of
from . import Skip

NAME = "sdpa"
LABEL = "PyTorch SDPA"
COMPILES = False


def reason() -> str | None:
    return None


def attention(case, x, check: bool):
    if check and case.dropout:
        raise Skip("its dropout bits are its own and cannot be given")
    leaves = {"q": x.q, "k": x.k, "v": x.v}
    mask, causal = x.mask, case.causal
    if case.bias != "none":
        with torch.no_grad():
            mask = bias_of(case, x, x.q.dtype)
            if x.mask is not None:
                mask = mask.masked_fill(~x.mask, float("-inf"))
    if mask is not None and causal:
        hidden = torch.ones(case.queries, case.keys, dtype=torch.bool, device=x.q.device).triu(1)
        if mask.dtype == torch.bool:
            mask = mask & ~hidden
        else:
            mask = mask.masked_fill(hidden, float("-inf"))
        causal = False
    if case.bias == "relative":
        mask = mask.contiguous().requires_grad_()
        leaves["mask"] = mask
    grouped = {"enable_gqa": True} if case.groups != case.heads else {}

    def call():
        return F.scaled_dot_product_attention(
            x.q, x.k, x.v, attn_mask=mask, dropout_p=case.dropout, is_causal=causal, **grouped
        )

    return call, leaves
