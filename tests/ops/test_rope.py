"""rope on every backend and dtype against fp64, in the one harness; in place; transformers' own."""
# ruff: noqa: E501 (tables, one case a line)

import functools
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import fasttx
from fasttx.reference.rope import rope_math
from fasttx.testing import check, lay_out, recorded_calls
from tests.ops import contract
from tests.ops.contract import (
    backend_fixture,
    check_compiled,
    every_case,
    opcheck,
    refused,
    skip_unusable,
)

BACKENDS = (*contract.BACKENDS, "torch")
NAMES = ("q_out", "k_out")
pytestmark = pytest.mark.filterwarnings("ignore:fasttx.rope runs on the plain")


@dataclass
class Case:
    """q [B,H,S,D], k [B,G,S,D]; width of cos and sin, of `angles` leading dimensions."""

    name: str
    shape: tuple = (2, 3, 2, 7, 32)  # B, H, G, S, D
    width: int | None = None
    angles: tuple = (2, 7)
    options: dict = field(default_factory=dict)
    layouts: dict = field(default_factory=dict)
    keep: tuple = ()
    quick: bool = False

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(len(self.name))
        B, H, G, S, D = self.shape
        width = D if self.width is None else self.width
        shapes = {"q": (B, H, S, D), "k": (B, G, S, D)}
        shapes |= dict.fromkeys(("cos", "sin"), (*self.angles, width))
        made = {
            n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()
        }
        return made | {n: made[n].float() for n in self.keep}

    def plain(self, compute, q, k, cos, sin):
        """With cos and sin as they are: halves need not be alike."""
        if cos.dim() == 2:
            cos, sin = cos[None], sin[None]
        rotary = self.options.get("rotary_dim", cos.shape[-1])
        rest = (cos, sin, rotary, self.options.get("interleaved", False))
        return tuple(rope_math(x, *rest, compute=compute) for x in (q, k))

    def function(self, backend):
        return functools.partial(fasttx.rope, **self.options, backend=backend)


GPTJ = {"interleaved": True}
ANGLES = ("cos", "sin")
CASES = [
    Case("halves", quick=True),
    Case("interleaved", options=GPTJ, quick=True),
    Case("one table for the batch", angles=(7,), quick=True),
    Case("one row of tables", angles=(1, 7)),
    Case("fp32 angles", keep=ANGLES),
    Case("fp32 angles, interleaved", options=GPTJ, keep=ANGLES),
    Case("partial", (2, 2, 3, 5, 40), 24, (5,), quick=True),
    Case("partial, interleaved", (2, 2, 3, 5, 40), 22, (5,), GPTJ, quick=True),
    Case("an angle a pair", (2, 2, 1, 9, 64), 32, (9,), {"rotary_dim": 64}, quick=True),
    Case("an angle a pair, interleaved", (2, 2, 1, 9, 64), 32, (9,), {"rotary_dim": 64, **GPTJ}),
    Case("an angle a pair, partial", (1, 2, 1, 9, 64), 10, (9,), {"rotary_dim": 20}),
    Case("an angle a pair, partial, interleaved", (1, 2, 1, 9, 64), 9, (9,), {"rotary_dim": 18, **GPTJ}),
    Case("rotary_dim of the width", (1, 2, 1, 9, 64), 20, (9,), {"rotary_dim": 20}),
    Case("odd head", (3, 1, 5, 11, 33), 14, (3, 11)),
    Case("odd pairs", (1, 2, 2, 5, 38), None, (5,)),
    Case("odd pairs, interleaved", (1, 2, 2, 5, 38), None, (5,), GPTJ),
    Case("one of each", (1, 1, 1, 1, 2), None, (1,)),
    Case("many rows", (1, 2, 1, 150, 16), None, (150,)),
    Case("many heads", (1, 20, 5, 70, 128), None, (70,), {"interleaved": True}),
    Case("wide head", (1, 2, 1, 3, 512), None, (3,)),
    Case("nothing turned", (1, 2, 1, 3, 6), 0, (3,)),
    Case("no rows", (2, 3, 2, 0, 8), None, (0,)),
    Case("no batch", (0, 3, 2, 4, 8), None, (4,)),
    Case("no key heads", (2, 3, 0, 4, 8), None, (4,)),
    Case("no heads", (2, 0, 0, 4, 8), None, (4,)),
    Case("no columns", (2, 3, 2, 4, 0), None, (4,)),
    *(
        Case(f"{layout}{', interleaved' * bool(options)}", (2, 3, 2, 7, 36), 28, (7,), options, dict.fromkeys(("q", "k", "cos", "sin", "dq_out"), layout))
        for layout in ("transposed", "sliced", "strided")
        for options in ({}, GPTJ)
    ),
    Case("upstream expanded", layouts={"dq_out": "expanded", "dk_out": "strided"}),
]  # fmt: skip
BY_NAME = {c.name: c for c in CASES}


backend = backend_fixture("rope_fwd", BACKENDS)


@pytest.mark.parametrize(("name", "dtype", "case"), list(every_case(CASES, backends=BACKENDS)))
def test_against_fp64(name: str, dtype: torch.dtype, case: Case):
    skip_unusable("rope_fwd", name)
    gold = functools.partial(case.plain, torch.float64)
    plain = functools.partial(case.plain, dtype)
    check(
        case.function(name), gold, plain, case.inputs(), dtype=dtype, wanted=("q", "k"),
        names=NAMES, keep=case.keep, layouts=case.layouts,
    )  # fmt: skip
    # In place gives the same bits.
    inputs = {n: t if n in case.keep else t.to(dtype) for n, t in case.inputs().items()}
    laid = {n: lay_out(t, case.layouts.get(n, "contiguous")) for n, t in inputs.items()}
    expected = case.function(name)(**laid)
    got = case.function(name)(**laid, inplace=True)
    assert got[0] is laid["q"] and got[1] is laid["k"]
    torch.testing.assert_close(got, expected, rtol=0, atol=0, check_stride=False)
    assert all(t.dtype is dtype for t in expected)


def _angles(S: int, R: int) -> Tensor:
    return torch.arange(S)[:, None] / 10000 ** (torch.arange(0, R, 2) / R)


def test_is_transformers(backend):
    """Llama's and GPT-J's own functions."""
    pytest.importorskip("transformers")
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    q, k, angles = torch.randn(2, 4, 9, 32), torch.randn(2, 2, 9, 32), _angles(9, 32)[None]
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    expected = llama(q, k, cos, sin)
    torch.testing.assert_close(fasttx.rope(q, k, cos, sin, backend=backend), expected)
    got = fasttx.rope(q, k, angles.cos(), angles.sin(), rotary_dim=32, backend=backend)
    torch.testing.assert_close(got, expected)
    # GPT-J turns [B, S, H, D].
    cos, sin = angles.cos(), angles.sin()
    expected = tuple(gptj(t.transpose(1, 2), sin, cos).transpose(1, 2) for t in (q, k))
    got = fasttx.rope(q, k, cos, sin, rotary_dim=32, interleaved=True, backend=backend)
    torch.testing.assert_close(got, expected)
    cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    got = fasttx.rope(q, k, cos, sin, interleaved=True, backend=backend)
    torch.testing.assert_close(got, expected)


def test_keeps_memory_order(backend):
    """The [B, S, H, D] memory of a projection stays, forward and backward."""
    x = torch.randn(2, 6, 4, 16, requires_grad=True)
    angles = _angles(6, 16)
    out, _ = fasttx.rope(
        x.transpose(1, 2), x.transpose(1, 2), angles.cos(), angles.sin(), rotary_dim=16, backend=backend
    )  # fmt: skip
    assert out.stride() == x.transpose(1, 2).stride()
    assert torch.autograd.grad(out.square().sum(), x)[0].is_contiguous()


@pytest.mark.parametrize("options", [{}, GPTJ])
def test_gradcheck(options):
    q, k = (torch.randn(2, n, 3, 6).double().requires_grad_() for n in (2, 1))
    cos, sin = torch.randn(3, 4).double(), torch.randn(3, 4).double()

    def function(q, k):
        return fasttx.rope(q, k, cos, sin, **options)

    def inplace(q, k):
        return fasttx.rope(q * 1, k * 1, cos, sin, inplace=True, **options)

    for f in (function, inplace):
        assert torch.autograd.gradcheck(f, (q, k))
        assert torch.autograd.gradgradcheck(f, (q, k))


@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_penalty(backend, inplace):
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 1, 4, 8)
    cos, sin = torch.randn(4, 8), torch.randn(4, 8)
    results = []
    for function in (
        lambda q, k: fasttx.rope(q * 1, k * 1, cos, sin, inplace=inplace, backend=backend),
        lambda q, k: tuple(rope_math(x, cos[None], sin[None], 8, False) for x in (q, k)),
    ):
        leaves = [t.clone().requires_grad_() for t in (q, k)]
        outputs = function(*leaves)
        loss = outputs[0].pow(3).sum() + outputs[1].pow(3).sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)])
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("of", "used"), [("q", "qk"), ("k", "qk"), ("qk", "q"), ("qk", "k")])
def test_subsets(of, used, inplace):
    """Gradients of some inputs, from some outputs."""
    x = {"q": torch.randn(2, 3, 4, 8), "k": torch.randn(2, 1, 4, 8)}
    cos, sin = torch.randn(4, 8), torch.randn(4, 8)
    leaves = {n: t.requires_grad_(n in of) for n, t in x.items()}
    given = [t * 1 for t in leaves.values()]
    outputs = dict(zip("qk", fasttx.rope(*given, cos, sin, inplace=inplace), strict=True))
    assert {n for n, t in outputs.items() if t.requires_grad} >= set(of)
    wanted = [n for n in of if n in used]
    loss = sum(outputs[n].square().sum() for n in used)
    got = torch.autograd.grad(loss, [leaves[n] for n in wanted])
    for name, grad in zip(wanted, got, strict=True):
        y = rope_math(leaves[name], cos[None], sin[None], 8, False).square().sum()
        torch.testing.assert_close(grad, torch.autograd.grad(y, leaves[name])[0])


def test_inplace_under_autograd(backend):
    """Views of one projection, turned where they lie: base and views carry on with the gradient."""
    x = torch.randn(2, 5, 4, 3, 8)
    cos, sin = torch.randn(5, 8), torch.randn(5, 8)
    results = []
    for inplace in (True, False):
        leaf = x.clone().requires_grad_()
        qkv = leaf.sin()
        qkv = qkv * 2
        q, k, v = (qkv[:, :, :, i].transpose(1, 2) for i in range(3))
        q, k = fasttx.rope(q, k, cos, sin, inplace=inplace, backend=backend)
        base = qkv.sum() if inplace else q.sum() + k.sum() + v.sum()
        loss = (q * k).square().sum() + (v * q).sum() + base
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*results)


def test_inplace_is_noticed():
    """What needs the old values raises; so does what cannot be overwritten, before anything is."""
    cos, sin = torch.randn(4, 8), torch.randn(4, 8)
    leaf = torch.randn(2, 2, 4, 8, requires_grad=True)
    q, k = leaf * 1, leaf * 1
    square = q.square()
    fasttx.rope(q, k, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
    with torch.no_grad():
        q, k = leaf.clone(), leaf.clone()
        before = q._version
        fasttx.rope(q, k, cos, sin, inplace=True)
        assert q._version > before and k._version > before
    q, k = (leaf * 1).unbind(0)
    held = q.detach().clone()
    with pytest.raises(ValueError, match="inplace cannot overwrite q, a view that autograd cannot"):
        fasttx.rope(q[None], k[None], cos, sin, inplace=True)
    assert torch.equal(q, held)
    with torch.inference_mode():
        x = torch.randn(2, 2, 4, 8)
        expected = fasttx.rope(x, x, cos, sin)[0]
        assert torch.equal(fasttx.rope(x, x.clone(), cos, sin, inplace=True)[0], expected)


def test_transforms():
    q, k, cos, sin = (torch.randn(2, 3, 4, 8), torch.randn(2, 1, 4, 8), *torch.randn(2, 4, 8))

    def loss(q, k, inplace):
        q, k = fasttx.rope(q * 1, k * 1, cos, sin, inplace=inplace)
        return (q.square() * k).sum()

    expected = torch.func.grad(
        lambda q, k: (
            rope_math(q, cos[None], sin[None], 8, False).square()
            * rope_math(k, cos[None], sin[None], 8, False)
        ).sum(),
        (0, 1),
    )(q, k)
    for inplace in (False, True):
        got = torch.func.grad(functools.partial(loss, inplace=inplace), (0, 1))(q, k)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["halves", "partial, interleaved", "transposed", "one of each"])
def test_opcheck_and_fake(name):
    case = BY_NAME[name]
    inputs = {
        n: lay_out(t.float(), case.layouts.get(n, "contiguous")) for n, t in case.inputs().items()
    }
    with recorded_calls() as calls:
        q, k = (inputs[n].requires_grad_() for n in "qk")
        out = case.function(None)(q, k, inputs["cos"], inputs["sin"])
        (out[0].sum() + out[1].sum()).backward()
        with torch.no_grad():
            case.function(None)(q * 1, k * 1, inputs["cos"], inputs["sin"], inplace=True)
    assert [op.name for op, _, _ in calls] == ["rope_fwd", "rope_bwd", "rope_inplace"]
    for op, args, _ in calls:
        opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_compile(dynamic, inplace):
    def full(q, k, cos, sin):
        q, k = fasttx.rope(q * 1, k * 1, cos, sin, inplace=inplace)
        return q * 2 + k

    def arguments(S):
        leaves = [torch.randn(2, 3, S, 24, requires_grad=True) for _ in range(2)]
        return [*leaves, torch.randn(S, 24), torch.randn(S, 24)]

    check_compiled(full, arguments, dynamic)
    with torch.no_grad():
        check_compiled(full, arguments, dynamic)


def test_every_instruction_set():
    code = (
        "import torch, fasttx\ng = torch.Generator().manual_seed(0)\nworst = 0\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    q, k, c, s = (torch.randn(n, generator=g).to(dtype) for n in ((2, 4, 70, 44), (2, 2, 70, 44), (70, 38), (70, 38)))\n"
        "    for interleaved in (False, True):\n"
        "        for x in (q, q.transpose(2, 3).contiguous().transpose(2, 3)):\n"
        "            got = fasttx.rope(x, k, c, s, interleaved=interleaved, backend='cpu')\n"
        "            want = fasttx.rope(*(t.double() for t in (x, k, c, s)), interleaved=interleaved, backend='reference')\n"
        "            for a, b in zip(got, want):\n"
        "                worst = max(worst, ((a - b).abs().max() / torch.finfo(dtype).eps).item())\n"
        "assert worst < 8, worst\n"
    )
    skip_unusable("rope_fwd", "cpu")
    for isa in ("default", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"FASTTX_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{isa}: {done.stderr}"


def test_threads_do_not_change_bits():
    q, k, cos, sin = (
        torch.randn(*n) for n in ((3, 4, 300, 64), (3, 2, 300, 64), (300, 64), (300, 64))
    )
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(fasttx.rope(q, k, cos, sin))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_more_than_32_bit_offsets(backend):
    """A head 2^31 elements after the first one: a stride, not memory."""
    if backend == "reference":
        pytest.skip("empty_like of such strides is as large")
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.float16)  # touched only where heads lie
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space: {error}")
    x = memory.as_strided((1, 2, 3, 8), (0, 2**31, 8, 1))
    x.copy_(torch.randn(1, 2, 3, 8))
    cos, sin = torch.randn(3, 8), torch.randn(3, 8)
    expected = fasttx.rope(x.clone(), x.clone(), cos, sin, backend=backend)[0]
    k = torch.randn(1, 1, 3, 8).half()
    assert torch.equal(fasttx.rope(x, k, cos, sin, inplace=True, backend=backend)[0], expected)


def test_autocast_keeps_dtypes():
    q, k, cos, sin = (torch.randn(2, 3, 4, 8), torch.randn(2, 1, 4, 8), *torch.randn(2, 4, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = fasttx.rope(q, k.clone(), cos, sin)
    torch.testing.assert_close(out, fasttx.rope(q, k, cos, sin), rtol=0, atol=0)


Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
C = torch.randn(5, 8)
LEAF = torch.randn(2, 4, 5, 8, requires_grad=True)
BAD = {
    "q type": (TypeError, "q must be a tensor, got list", {"q": [1.0]}),
    "q dtype": (TypeError, "q must be float32, .* got int64", {"q": Q.long()}),
    "q rank": (ValueError, r"q must be \[B, H, S, D\], got shape \(4, 5, 8\)", {"q": Q[0]}),
    "k type": (TypeError, "k must be a tensor, got NoneType", {"k": None}),
    "k dtype": (TypeError, "k must have q's dtype float32, got bfloat16", {"k": K.bfloat16()}),
    "k batch": (ValueError, r"k must be \[2, G, 5, 8\] as q is, got shape \(1, 2, 5, 8\)", {"k": K[:1]}),
    "k rows": (ValueError, r"k must be \[2, G, 5, 8\] as q is, got shape \(2, 2, 4, 8\)", {"k": K[:, :, :4]}),
    "k columns": (ValueError, r"k must be \[2, G, 5, 8\] as q is, got shape \(2, 2, 5, 6\)", {"k": K[..., :6]}),
    "k rank": (ValueError, r"k must be \[2, G, 5, 8\] as q is, got shape \(2, 5, 8\)", {"k": K[:, 0]}),
    "k device": (ValueError, "k must be on q's device cpu, got meta", {"k": K.to("meta")}),
    "cos type": (TypeError, "cos must be a tensor, got float", {"cos": 1.0}),
    "cos dtype": (TypeError, "cos must be float32, .* got int64", {"cos": C.long()}),
    "cos double": (TypeError, "cos must be float64 exactly where q is, got float64 beside float32", {"cos": C.double()}),
    "cos single": (TypeError, "cos must be float64 exactly where q is, got float32 beside float64", {"q": Q.double(), "k": K.double()}),
    "cos device": (ValueError, "cos must be on q's device cpu, got meta", {"cos": C.to("meta")}),
    "cos grad": (ValueError, "cos must not require grad, got requires_grad=True", {"cos": C.clone().requires_grad_()}),
    "sin grad": (ValueError, "sin must not require grad, got requires_grad=True", {"sin": C.clone().requires_grad_()}),
    "cos rows": (ValueError, r"cos must be \[5, R\], \[1, 5, R\] or \[2, 5, R\], got shape \(4, 8\)", {"cos": C[:4], "sin": C[:4]}),
    "cos batch": (ValueError, r"cos must be \[5, R\], .* got shape \(3, 5, 8\)", {"cos": C.expand(3, 5, 8), "sin": C.expand(3, 5, 8)}),
    "cos rank": (ValueError, r"cos must be \[5, R\], .* got shape \(2, 1, 5, 8\)", {"cos": C.expand(2, 1, 5, 8)}),
    "odd width": (ValueError, r"cos must have an even width of at most D=8, got shape \(5, 7\)", {"cos": C[:, :7], "sin": C[:, :7]}),
    "too wide": (ValueError, r"cos must have an even width of at most D=8, got shape \(5, 16\)", {"cos": torch.ones(5, 16), "sin": torch.ones(5, 16)}),
    "sin type": (TypeError, "sin must be a tensor, got int", {"sin": 0}),
    "sin shape": (ValueError, r"sin must have cos's shape and dtype \(5, 8\) float32, got \(5, 6\) float32", {"sin": C[:, :6]}),
    "sin dtype": (ValueError, r"sin must have cos's shape and dtype .* got \(5, 8\) float16", {"sin": C.half()}),
    "rotary type": (TypeError, "rotary_dim must be an int or None, got 8.0", {"rotary_dim": 8.0}),
    "rotary width": (ValueError, "rotary_dim must be even, at most D=8 and once or twice the width 8 of cos and sin, got 4", {"rotary_dim": 4}),
    "rotary wide": (ValueError, "rotary_dim must be even, at most D=8 .* got 16", {"rotary_dim": 16}),
    "rotary odd": (ValueError, "rotary_dim must be even, .* the width 7 .* got 7", {"rotary_dim": 7, "cos": C[:, :7], "sin": C[:, :7]}),
    "one tensor": (ValueError, "inplace needs q and k of their own, got one tensor for both", {"k": Q, "inplace": True}),
    "expanded": (ValueError, r"inplace needs k with memory of its own for every element, got shape \(2, 2, 5, 8\) with strides \(0, ", {"k": K[:1].expand(2, -1, -1, -1), "inplace": True}),
    "leaf": (ValueError, "inplace cannot overwrite q, a leaf that requires grad", {"q": LEAF, "inplace": True}),
    "backend": (ValueError, "backend must be None or one of cpu, cuda, triton, reference, torch, got 'cudnn'", {"backend": "cudnn"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    refused(monkeypatch, fasttx.rope, BAD[name], q=Q, k=K, cos=C, sin=C)


def test_unsupported_lists_every_reason():
    x, c = Q.double(), C.double()
    with pytest.raises(NotImplementedError, match=r"cpu: needs float32.*got float64"):
        fasttx.rope(x, x, c, c, backend="cpu")
