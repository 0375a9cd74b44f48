"""Cards, drivers and builds that the CUDA C++ kernels cannot run on: one sentence, and the next
backend."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttx import kernel as kernels
from fasttx import native
from fasttx.op import OPS, Kernel, Needs

WITH_CUDA = [o for o in OPS.values() if any(k.backend == "cuda" for k in o.tables.get("cuda", ()))]
DEVICE = torch.device("cuda:0")
OLD = (
    "the NVIDIA driver is too old for the CUDA C++ kernels: it runs CUDA 12.4, they were built "
    "with CUDA "
)
NO_IMAGE = "no kernel image is available for execution on the device"


@pytest.fixture
def card(monkeypatch):
    """A CUDA device of any compute capability, without one."""

    def make(capability: int):
        monkeypatch.setattr(kernels, "_compute_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    return make


@pytest.fixture
def probed(card, monkeypatch):
    """A kernel of the library whose probe says what it is told."""
    card(90)
    library = torch.library.Library("fasttx_native", "FRAGMENT")
    if not hasattr(torch.ops.fasttx_native, "pretended_cuda"):
        library.define("pretended_cuda() -> ()")
    monkeypatch.setattr(native, "unavailable", lambda: None)

    def make(status: int, text: str, built: int, driver: int) -> Kernel:
        monkeypatch.setattr(native, "_probe_cuda", lambda: (status, text, built, driver))
        return Kernel("cuda", "native:pretended_cuda", Needs(dtypes=None, sm=80))

    yield make
    library._destroy()


@pytest.mark.parametrize("op", WITH_CUDA, ids=lambda op: op.name)
def test_a_card_below_sm_80(op, card):
    card(75)
    with FakeTensorMode():
        x = torch.empty(16, 16, 16, 16, device=DEVICE, dtype=torch.bfloat16)
    for kernel in op.tables["cuda"]:
        needs = replace(kernel.needs, sizes={}, absent=(), matrices={})
        expected = "needs compute capability 8.0, this device has 7.5"
        expected = expected if kernel.backend in ("triton", "cuda") else None
        assert needs.refuse((x,) * len(op.at), op.at) == expected


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ((0, "no error", 13000, 13010), None),
        ((35, "CUDA driver version is insufficient", 13000, 12040), OLD + "13.0"),
        ((222, "the PTX was compiled with another toolchain", 13010, 12040), OLD + "13.1"),
        (
            (209, NO_IMAGE, 13000, 13000),
            f"the CUDA C++ kernels cannot run on this card: {NO_IMAGE}",
        ),
    ],
)
def test_a_driver_or_card_that_cannot_load_them(probed, probe, reason):
    kernel = probed(*probe)
    with FakeTensorMode():
        x = torch.empty(2, device=DEVICE)
    assert kernel.refuse((x,), {}) == reason
    # A reason is asked for again, a kernel that runs is not.
    assert (kernel.function is None) == (reason is not None)


def test_the_next_backend_runs(probed, monkeypatch):
    op = OPS["softmax_fwd"]
    kernel = probed(35, "insufficient", 13000, 12040)
    reference = next(k for k in op.tables["cuda"] if k.backend == "reference")
    monkeypatch.setattr(op, "tables", {"cuda": [kernel, reference]})
    monkeypatch.setattr("fasttx.op._told", set())  # else said once
    with FakeTensorMode():
        x = torch.empty(2, 8, device=DEVICE, dtype=torch.bfloat16)
    args = (x, None, 1.0, False, False, False, False)
    with pytest.warns(RuntimeWarning, match="cuda: the NVIDIA driver is too old"):
        assert op.pick(args) is reference
    with pytest.raises(NotImplementedError, match="cuda: the NVIDIA driver is too old"):
        op.pick(args, "cuda")


@pytest.mark.parametrize("op", WITH_CUDA, ids=lambda op: op.name)
def test_a_library_built_without_them(op, card):
    if native.unavailable():
        pytest.skip(native.unavailable())
    if native.has_cuda_kernels():
        pytest.skip("the library was built with them")
    card(90)
    (kernel,) = (k for k in op.tables["cuda"] if k.backend == "cuda")
    assert kernel.unavailable(DEVICE).startswith("libfasttx was built without the CUDA C++ kernels")


def test_the_library_answers():
    """Its own words, where it has them: on a machine without a card, that there is none."""
    if native.unavailable() or not native.has_cuda_kernels():
        pytest.skip("the library was built without them")
    status, text, built, _ = native._probe_cuda()
    assert text and built >= 12000
    assert (status == 0) == torch.cuda.is_available()
