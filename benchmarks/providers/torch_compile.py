"""torch.compile of the formula written out: Inductor fuses what it can."""

import shutil

import torch

from ..ops.attention_case import bias_of, plain
from . import Skip

NAME = "torch_compile"
LABEL = "torch.compile"
COMPILES = True


def reason() -> str | None:
    if torch.cuda.is_available() or any(map(shutil.which, ("g++", "clang++", "c++"))):
        return None
    return "Inductor needs a C++ compiler and none was found"


def attention(case, x, check: bool):
    if check and case.dropout:
        raise Skip("its dropout bits are its own and cannot be given")
    torch._dynamo.reset()
    # The backward is timed alone, again and again on one graph.
    torch._functorch.config.donated_buffer = False

    @torch.compile(dynamic=False)
    def formula(q, k, v, mask, bias):
        return plain(q, k, v, causal=case.causal, mask=mask, bias=bias, dropout=case.dropout)

    def call():
        return formula(x.q, x.k, x.v, x.mask, bias_of(case, x, x.q.dtype))

    return call, x.leaves()
