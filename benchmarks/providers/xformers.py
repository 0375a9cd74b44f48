"""xformers' memory-efficient attention. Written from its documentation; not yet run on a GPU
here."""

import importlib

from . import Skip
from ._found import missing

NAME = "xformers"
LABEL = "xformers"
COMPILES = False


def reason() -> str | None:
    return missing("xformers", cuda=True)


def attention(case, x, check: bool):
    if case.padding or case.bias != "none" or case.groups != case.heads:
        raise Skip("only full and causal attention of equal heads is compared")
    if check and case.dropout:
        raise Skip("its dropout bits are its own and cannot be given")
    fmha = importlib.import_module("xformers.ops")
    mask = fmha.LowerTriangularMask() if case.causal else None
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))

    def call():
        out = fmha.memory_efficient_attention(q, k, v, attn_bias=mask, p=case.dropout)
        return out.transpose(1, 2)

    return call, x.leaves()
