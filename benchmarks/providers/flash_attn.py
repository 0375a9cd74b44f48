"""The flash-attention package. Written from its documentation; not yet run on a GPU here."""

import importlib

from . import Skip
from ._found import missing

NAME = "flash_attn"
LABEL = "flash-attention"
COMPILES = False


def reason() -> str | None:
    return missing("flash_attn", cuda=True)


def attention(case, x, check: bool):
    if case.dtype == "fp32":
        raise Skip("it has no float32")
    if case.padding or case.bias == "relative":
        raise Skip("it has no masks and no relative bias")
    if check and case.dropout:
        raise Skip("its dropout bits are its own and cannot be given")
    function = importlib.import_module("flash_attn").flash_attn_func
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    slopes = x.slopes.float() if case.bias == "alibi" else None

    def call():
        return function(
            q, k, v, dropout_p=case.dropout, causal=case.causal, alibi_slopes=slopes
        ).transpose(1, 2)

    return call, x.leaves()
