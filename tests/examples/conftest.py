import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """example("king_james"): that file of examples/ as a module, its neighbours importable."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module
