"""PyTorch eager: the formula written out, N x N probabilities and all."""

from ..ops.attention_case import bias_of, plain

NAME = "eager"
LABEL = "PyTorch eager"
COMPILES = False


def reason() -> str | None:
    return None


def attention(case, x, check: bool):
    bits = {"keep": x.keep} if check and case.dropout else {}

    def call():
        bias = bias_of(case, x, x.q.dtype)
        return plain(
            x.q, x.k, x.v,
            causal=case.causal, mask=x.mask, bias=bias, dropout=case.dropout, **bits,
        )  # fmt: skip

    return call, x.leaves()
