"""For those who run the benchmarks under pytest-benchmark."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def problems():
    """Problems by case, each with its fp64 answer; only the latest one is kept."""
    return {}
