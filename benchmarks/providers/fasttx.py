"""fasttx.attention: the backend it picks by itself, or the one asked for."""

import importlib

from . import Skip

NAME = "fasttx"
LABEL = "fasttx"
COMPILES = False
BACKEND: str | None = None


def reason() -> str | None:
    try:
        module = importlib.import_module("fasttx")
    except ImportError as error:
        return f"fasttx cannot be imported: {error}"
    return None if hasattr(module, "attention") else "this fasttx has no attention yet"


def attention(case, x, check: bool):
    fasttx = importlib.import_module("fasttx")
    options = _options(fasttx, case, x, check)
    try:
        fasttx.explain(fasttx.attention, x.q, x.k, x.v, **options)
    except NotImplementedError as error:
        raise Skip(str(error)) from error
    return lambda: fasttx.attention(x.q, x.k, x.v, **options), x.leaves()


def backend_of(case, x) -> str | None:
    """The name of the kernel that runs, as fasttx.explain tells it."""
    fasttx = importlib.import_module("fasttx")
    told = fasttx.explain(fasttx.attention, x.q, x.k, x.v, **_options(fasttx, case, x, False))
    return told.chosen("attention_fwd")


def _options(fasttx, case, x, check: bool) -> dict:
    bias = None
    if case.bias == "alibi":
        bias = fasttx.ALiBi(x.slopes)
    elif case.bias == "relative":
        bias = fasttx.RelativePositionBias(x.table, bidirectional=True)
    return {
        "attn_mask": x.mask,
        "dropout_p": case.dropout,
        "is_causal": case.causal,
        "position_bias": bias,
        "seed": x.seed if check and case.dropout else None,
        "backend": BACKEND,
    }
