import pytest
import torch

from fasttx.training import loop


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_plots(request, monkeypatch):
    """A picture costs more than these runs: only the tests that look at one make it."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(loop, "plot_losses", lambda folder: None)


@pytest.fixture
def plots():
    """loss.png is made."""
