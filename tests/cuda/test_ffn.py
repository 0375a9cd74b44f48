"""ffn's CUDA kernels in the emulator, on both kinds of card: against fp64, and what they keep,
recompute and leave out."""

import pytest
import torch

import fasttx
from fasttx.ops.ffn import ffn_bwd, ffn_fwd
from fasttx.reference.philox import philox_mask
from fasttx.testing import check
from tests.ops.test_ffn import AGAIN, DROP, NAMES, PLAIN, TURNED, WEIGHTS, Case

from .emulated import mode
from .gemm_kernels import KERNELS, gemm_kernel, selected

SWIGLU, GEGLU = {"activation": "swiglu"}, {"activation": "geglu"}
TAKEN = {"dout": "strided", "b1": "strided", "b2": "strided", "b_gate": "strided"}
CASES = [
    Case("plain", (5, 3), (24, 40, 16)),
    Case("everything", (3, 7), (24, 40, 16), NAMES, {**DROP, **SWIGLU}),
    Case("everything again", (20,), (24, 40, 16), NAMES, {**DROP, **AGAIN, **SWIGLU}, TURNED),
    Case("many tiles", (140,), (72, 200, 136), NAMES, {**DROP, **GEGLU}),
    Case("many tiles, transposed", (140,), (72, 200, 136), NAMES, {**AGAIN, **GEGLU}, TURNED),
    Case("no gate", (140,), (136, 264, 72), PLAIN, {**DROP, "activation": "gelu_tanh"}),
    Case("no gate, transposed", (70,), (136, 264, 72), PLAIN, {"activation": "silu"}, TURNED),
    Case("odd columns", (40,), (24, 40, 13), NAMES, {**DROP, "activation": "reglu"}),
    Case("odd hidden layer", (40,), (24, 39, 16), NAMES, GEGLU, {"w2": "transposed"}),
    Case("no biases", (70,), (24, 48, 32), WEIGHTS, {"activation": "relu"}),
    Case("gate alone", (66,), (24, 48, 32), (*WEIGHTS, "w_gate"), {"activation": "silu", **AGAIN}),
    Case("hidden dropout", (40,), (16, 152, 8), PLAIN, {"hidden_dropout_p": 0.5, "seed": -3}),
    Case("output dropout", (40,), (16, 24, 152), PLAIN, {"dropout_p": 0.5, "seed": 2**40}),
    Case("sums over many rows", (1100,), (16, 24, 8), NAMES, {**DROP, **GEGLU}),
    Case("any strides", (6, 5), (16, 40, 24), NAMES, DROP, TAKEN),
    Case("expanded", (8, 4), (16, 40, 24), PLAIN, {}, {"dout": "expanded"}),
    Case("one row", (), (40, 72, 24), NAMES, {**DROP, "activation": "geglu_tanh"}),
    Case("no rows", (0, 2), (16, 8, 8), NAMES, DROP),
]
QUICK = {"plain", "everything", "everything again", "many tiles", "odd columns", "any strides"}
QUICK |= {"no gate, transposed", "no rows", "sums over many rows"}


@pytest.mark.parametrize(("dtype", "kernel", "case"), list(selected(CASES, QUICK, "sm80")))
def test_against_fp64(dtype: torch.dtype, kernel: str, case: Case):
    with gemm_kernel(kernel), mode(len(case.name) % 2 == 1, len(case.name) % 3):
        check(
            case.function("cuda"), case.function(None, compute=torch.float64),
            case.function(None, compute=dtype), case.inputs(), dtype=dtype, wanted=case.given,
            layouts=case.layouts,
        )  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_follows_the_other_backends(kernel):
    """What the forward keeps and what a backward makes of what another kept, with it and without;
    every subset of gradients is a part of the whole."""
    case = Case("", (7,), (16, 24, 8), NAMES)
    x, w1, b1, w2, b2, wg, bg = (t.bfloat16() for t in case.inputs().values())
    seed, g, near = torch.tensor([9]), torch.randn(7, 8).bfloat16(), {"atol": 4e-2, "rtol": 2e-2}
    rest = (seed, 4, 0.3, 0.2)
    with gemm_kernel(kernel):
        forward = (x, w1, b1, w2, b2, wg, bg, *rest, True)
        ours, theirs = (ffn_fwd(*forward, backend=b) for b in ("cuda", "reference"))
        torch.testing.assert_close(ours, theirs, **near)
        for pre in (theirs[1:], (None, None)):
            backward = (x, *pre, g, w1, b1, w2, wg, bg, *rest)
            whole = ffn_bwd(*backward, 127, backend="cuda")
            expected = ffn_bwd(*backward, 127, backend="reference")
            torch.testing.assert_close(whole, expected, **near)
            for need in (1, 2, 4, 8, 16, 32, 64, 17, 36, 90):
                parts = ffn_bwd(*backward, need, backend="cuda")
                for bit, (got, want) in enumerate(zip(parts, whole, strict=True)):
                    assert torch.equal(got, want) if need >> bit & 1 else got.numel() == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_schedules_give_the_same_bits(kernel):
    case = Case("", (260,), (72, 136, 64), NAMES, {**DROP, **GEGLU})
    results = []
    for eager, seed in ((False, 0), (True, 1), (False, 2)):
        inputs = {n: t.bfloat16().requires_grad_() for n, t in case.inputs().items()}
        with gemm_kernel(kernel), mode(eager, seed):
            out = case.function("cuda")(**inputs)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", [0, -1, 2**33 + 5])
def test_dropout_bits(kernel, seed):
    """h = 1 where kept: its columns show the hidden bits, their sum times ones the output's."""
    rows, hidden, N = 140, 40, 136
    x, one = torch.ones(rows, 8).half() / 8, torch.ones(hidden, 8).half()
    options, key = {"activation": "relu", "seed": seed, "backend": "cuda"}, torch.tensor([seed])
    with gemm_kernel(kernel):
        eye = torch.eye(hidden).half()
        got = fasttx.ffn(x, one, None, eye, None, hidden_dropout_p=0.25, **options)
        keep = philox_mask(key, 0.25, 1, 1, rows, hidden)[0, 0]
        assert torch.equal(got, (keep * torch.tensor(1 / 0.75)).half())
        ones = torch.ones(N, 8).half() / 8
        got = fasttx.ffn(x, one[:8], None, ones, None, dropout_p=0.25, **options)
        keep = philox_mask(key, 0.25, 1, 2, rows, N)[0, 1]
        assert torch.equal(got, (keep * torch.tensor(1 / 0.75)).half())


def test_a_gate_that_lies_otherwise_is_refused():
    x, w1, w2 = torch.randn(4, 16), torch.randn(24, 16), torch.randn(8, 24)
    gate = torch.randn(16, 24).t()
    tensors = [t.bfloat16() for t in (x, w1, w2)]
    with pytest.raises(NotImplementedError, match="cuda: needs w_gate to lie in memory as w1"):
        fasttx.ffn(*tensors[:2], None, tensors[2], None, w_gate=gate.bfloat16(), backend="cuda")
