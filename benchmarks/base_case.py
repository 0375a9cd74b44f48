"""A process of ``--base``, which has one of the two commits of fasttx (base.py).

What is imported here, it may be an old one; so only what ops need, and nothing new of fasttx's.
"""

from __future__ import annotations

import gc
import warnings
from dataclasses import asdict

import torch

from . import ops, providers
from .ops import attention, generic


def prepare(threads: int, device: str, options: dict) -> dict:
    """For apart.py: `open` gets a case ready, `call` runs fasttx on it, `verdict` checks it.
    `open` refuses a case that is another one here."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", RuntimeWarning)
    ours, ready = providers.find()["fasttx"], {}

    def open(op: str, index: int, name: str, direction: str) -> None:
        ready.clear()
        gc.collect()
        module = ops.find(op)
        case = ops.cases(module, **options)[index]
        if f"{case.name} {case.dtype}" != name:
            raise ValueError(f"case {index} of {op} is {case.name} {case.dtype}, not {name}")
        source = module if hasattr(module, "Problem") else generic
        problem = source.Problem(case, torch.device(device), direction != "forward")
        if source is attention:
            call, leaves = ours.attention(case, problem.x, check=False)
            ready["call"] = attention.timed_call(call, leaves, problem.x.dout, direction)
            ready["verdict"] = lambda: problem.verdict(ours, direction)
        else:
            ready["call"] = problem.timed("fasttx", direction)
            ready["verdict"] = lambda: problem.verdict("fasttx", direction)

    def call() -> None:
        ready["call"]()

    return {"open": open, "call": call, "verdict": lambda: asdict(ready["verdict"]())}
