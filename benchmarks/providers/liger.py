"""Liger Kernel's Triton ops. Written from its signatures; not yet run on a GPU here."""

import importlib

from ._found import missing

NAME = "liger"
LABEL = "Liger Kernel"
COMPILES = True


def reason() -> str | None:
    return missing("liger_kernel", cuda=True)


def op(case):
    """The case as a function of its inputs, or None where Liger has no such op."""
    functions = importlib.import_module("liger_kernel.transformers.functional")
    make = _OPS.get(case.op)
    return None if make is None else make(case, functions)


def _add_norm(case, f):
    if case.features["dropout"]:
        return None
    if case.features["kind"] == "rms":
        return lambda x: (
            f.liger_rms_norm(x["x"] + x["residual"], x["weight"], 1e-5, in_place=False) + x["bias"]
        )
    return lambda x: f.liger_layer_norm(x["x"] + x["residual"], x["weight"], x["bias"], 1e-5)


def _cross_entropy(case, f):
    return lambda x: f.liger_cross_entropy(x["logits"], x["target"])


def _linear_cross_entropy(case, f):
    return lambda x: f.liger_fused_linear_cross_entropy(x["x"], x["weight"], x["target"])


def _softmax(case, f):
    if "mask" in case.features or case.features["dim"] != -1 or case.features["log"]:
        return None
    return lambda x: f.liger_softmax(x["x"])


def _rope(case, f):
    if case.features["form"]:
        return None
    return lambda x: f.liger_rope(x["q"].clone(), x["k"].clone(), x["cos"], x["sin"])


_OPS = {
    "add_norm": _add_norm,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "softmax": _softmax,
    "rope": _rope,
}
