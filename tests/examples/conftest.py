import importlib
from pathlib import Path

import pytest
import torch

from fasttx.training import loop

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """example("king_james"): that file of examples/ as a module, its neighbours importable."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture(autouse=True)
def _one_thread_and_no_plots(monkeypatch):
    """A second thread only waits, and a picture costs more than these runs."""
    monkeypatch.setattr(loop, "plot_losses", lambda folder: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
