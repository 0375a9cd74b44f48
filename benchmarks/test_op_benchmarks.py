"""The cases of ``fasttx bench op`` but attention's, for those who live in pytest.

    pytest benchmarks -k softmax --benchmark-group-by=group

What is too wrong to be timed fails here; see test_attention_benchmark.py.
"""

import time

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from fasttx.benchmarks import ops
from fasttx.benchmarks.ops import generic

NAMES = [name for name in ops.names() if name != "attention"]
CASES = [case for name in NAMES for case in ops.find(name).quick_cases(("fp32", "bf16"))]
EVERY = [
    pytest.param(case, direction, name, id=f"{case.op} {case.case} {case.dtype} {direction} {name}")
    for case in CASES
    for direction in case.directions
    for name in case.contenders
]


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize(("case", "direction", "name"), EVERY)
def test_op(benchmark, problems, case, direction, name):
    key = id(case)
    if key not in problems:
        problems.clear()
        problems[key] = generic.Problem(case, torch.device("cpu"))
    problem = problems[key]
    try:
        verdict = problem.verdict(name, direction)
        call = problem.timed(name, direction)
    except NotImplementedError as why:
        pytest.skip(str(why))
    assert verdict.ok is not False, verdict.why
    benchmark.group = f"{case.op} {case.case} {case.dtype} {direction}"
    benchmark.extra_info |= {"error": verdict.worst, "flops": case.flops.get(direction)}
    benchmark(call)
