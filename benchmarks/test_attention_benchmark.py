"""The cases of ``fasttx bench --quick`` for those who live in pytest.

    pytest benchmarks --benchmark-group-by=group

Not collected by the tests of the project. A provider whose answer fails the check fails here
instead of being timed. One thread, its CPU time; providers do not take turns here as they do in
``harness.py``.
"""

import time

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from fasttx.benchmarks import providers
from fasttx.benchmarks.ops import attention

CASES = attention.quick_cases(("fp32", "bf16"))


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("name", [name for name in providers.find() if name != "torch_compile"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.dtype}")
def test_attention(benchmark, problems, case, direction, name):
    provider = providers.find()[name]
    if (why := provider.reason()) is not None:
        pytest.skip(why)
    if case not in problems:
        problems.clear()
        problems[case] = attention.Problem(case, torch.device("cpu"))
    problem = problems[case]
    verdict = problem.verdict(provider, direction)
    if verdict.ok is None:
        pytest.skip(verdict.why)
    assert verdict.ok, verdict.why
    call, leaves = provider.attention(case, problem.x, check=False)
    benchmark.group = f"{case.name} {case.dtype} {direction}"
    benchmark.extra_info |= {"error": verdict.worst, "flops": case.flops(direction)}
    benchmark(attention.timed_call(call, leaves, problem.x.dout, direction))
