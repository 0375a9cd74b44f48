import pytest

from tests.emulator.build import why_not


@pytest.fixture(autouse=True, scope="session")
def _emulated():
    if why_not():
        yield
        return
    from .emulated import emulated

    with emulated():
        yield


@pytest.fixture(autouse=True)
def _needs_the_emulator(_emulated):
    if reason := why_not():
        pytest.skip(reason)
