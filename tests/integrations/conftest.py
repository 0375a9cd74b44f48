"""The models here are tiny: a second thread only waits."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def reference_allowed(monkeypatch):
    """fp64 runs on the reference."""
    monkeypatch.delenv("FASTTX_STRICT", raising=False)
