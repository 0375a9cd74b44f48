"""torch's FlexAttention: causal and padding as block masks, biases as score functions."""

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..ops.attention_case import relative_buckets
from . import Skip, torch_compile

NAME = "flex_attention"
LABEL = "FlexAttention"
COMPILES = True
EXTRA = True
NO_BACKWARD = ("cpu",)


def reason() -> str | None:
    return torch_compile.reason()


def attention(case, x, check: bool):
    if case.dropout:
        raise Skip("it has no dropout")
    torch._dynamo.reset()
    run = torch.compile(flex_attention, dynamic=False)
    options = {"score_mod": _scores(case, x), "block_mask": _blocks(case, x)}
    grouped = {"enable_gqa": True} if case.groups != case.heads else {}

    q, k, v = (t.detach() if t.is_cpu else t for t in (x.q, x.k, x.v))

    def call():
        return run(q, k, v, **options, **grouped)

    return call, x.leaves()


def _scores(case, x):
    if case.bias == "alibi":
        return lambda score, b, h, i, j: score + x.slopes[h] * j
    if case.bias == "relative":
        buckets = relative_buckets(case.queries, case.keys, x.q.device)
        table = x.table.detach() if x.q.device.type == "cpu" else x.table
        return lambda score, b, h, i, j: score + table[buckets[i, j], h]
    return None


def _blocks(case, x):
    if not case.causal and x.mask is None:
        return None

    def visible(b, h, i, j):
        seen = i >= j if case.causal else torch.ones((), dtype=torch.bool, device=x.q.device)
        return seen if x.mask is None else seen & x.mask[b, 0, 0, j]

    batch = case.batch if x.mask is not None else None
    return create_block_mask(visible, batch, None, case.queries, case.keys, device=str(x.q.device))
