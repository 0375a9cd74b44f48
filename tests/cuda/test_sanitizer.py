"""The kernels in the emulator under AddressSanitizer: no access outside a tensor's memory."""

import pytest

from tests.emulator.test_sanitizer import sanitized

pytestmark = pytest.mark.slow


OPS = ["add_norm", "rope", "cross_entropy", "softmax", "embed", "attention", "attention_decode"]
OPS += ["attention_sm90", "attention_bwd_sm90", "linear", "ffn"]


@pytest.mark.parametrize("op", OPS)
def test_the_kernels_are_clean(op):
    done = sanitized(
        "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not slow",
        "-k", "not bug and not refused", f"tests/cuda/test_{op}.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
