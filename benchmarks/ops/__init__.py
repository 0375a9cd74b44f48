"""One module an op: its cases, inputs, fp64 answer, and the FLOPs a call is worth.

An op module has ``cases(options) -> list`` and a case has ``directions``, ``prepare`` and the
facts that end up in a row; ``benchmarks/ops/attention.py`` is the pattern.
"""

NAMES = ("attention",)
