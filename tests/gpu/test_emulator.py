"""The emulator beside a card: its demonstration kernels, the same .cu, compiled by nvcc.

Whole numbers leave nothing to round, so the bits must be equal. With random numbers they may part:
a card adds the products of one instruction in an order, and to a precision, of its own.
"""

import ctypes
import shutil
import subprocess

import pytest
import torch

from tests.emulator import instructions
from tests.emulator.build import HERE, ROOT, why_not
from tests.emulator.test_instructions import HALF, product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> ctypes.CDLL:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the demonstration kernels are for sm_90a")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    library = tmp_path_factory.mktemp("card") / "libcard.so"
    command = [nvcc, "-shared", "-cudart", "static", "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}"]
    command += ["-Xcompiler=-fPIC", "-gencode=arch=compute_90a,code=sm_90a", "-o", library]
    subprocess.run([*command, *sorted(HERE.glob("kernels/*.cu"))], check=True, capture_output=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def both(card, monkeypatch):
    """function -> its results in the emulator and on the card, whose tensors come back."""
    emulated = instructions.library()

    def run(function, *tensors, **options):
        results = []
        for library, device in ((emulated, "cpu"), (card, "cuda")):
            monkeypatch.setattr(instructions, "library", lambda library=library: library)
            found = function(*(t.to(device) for t in tensors), **options)
            torch.cuda.synchronize()
            found = found if isinstance(found, tuple) else (found,)
            results.append([t.cpu() for t in found])
        return results

    return run


def whole(*shape, dtype):
    return torch.randint(-4, 5, shape).to(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_mma(both, dtype, transposed):
    a, b = whole(72, 104, dtype=dtype), whole(40, 104, dtype=dtype)
    given = a.T.contiguous() if transposed else a
    emulated, real = both(instructions.gemm_mma, given, b, transposed=transposed)
    assert all(map(torch.equal, emulated, real))
    assert torch.equal(real[0], product(a, b))


@pytest.mark.parametrize(
    ("columns", "swizzle", "transposed"),
    [*((64, 3, 0), (64, 2, 0), (64, 1, 0), (192, 3, 0), (256, 2, 0)), *((128, 3, 1), (64, 1, 1))],
)
@pytest.mark.parametrize("registers", [False, True], ids=["shared", "registers"])
def test_wgmma(both, columns, swizzle, transposed, registers):
    dtype = torch.float16 if registers else torch.bfloat16
    a, b = whole(72, 168, dtype=dtype), whole(columns + 8, 168, dtype=dtype)
    given = b.T.contiguous() if transposed else b
    options = {"columns": columns, "swizzle": swizzle, "transposed": bool(transposed)}
    emulated, real = both(instructions.gemm_wgmma, a, given, registers=registers, **options)
    assert torch.equal(emulated[0], real[0])
    assert torch.equal(real[0], product(a, b))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounding(both, dtype):
    """Random numbers: both within float32's rounding of a sum of 168 products."""
    a, b = torch.randn(72, 168).to(dtype), torch.randn(72, 168).to(dtype)
    for results in (
        both(instructions.gemm_mma, a, b),
        both(instructions.gemm_wgmma, a, b, columns=64, swizzle=3),
    ):
        for (found, *_), steps in zip(results, (4, 16), strict=True):
            bound = steps * 2**-24 * (a.float().abs() @ b.float().abs().T)
            assert ((found - product(a, b)).abs() <= bound + 1e-6).all()


def test_bulk_copies_take_turns(both):
    emulated, real = both(instructions.bulk_add, torch.randn(5, 512), torch.randn(512))
    assert torch.equal(emulated[0], real[0])


@pytest.mark.parametrize("which", range(9))
def test_lanes(card, monkeypatch, which):
    emulated = instructions.lanes(which)
    monkeypatch.setattr(instructions, "library", lambda: card)
    assert instructions.lanes(which, "cuda") == emulated
