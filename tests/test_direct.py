"""Direct calls of native ops: the same answers as through the dispatcher, and only where nothing
but the kernel has to do with the call."""

import gc
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fasttx
from fasttx import native
from fasttx import op as contract
from fasttx.kernel import Kernel, Needs
from fasttx.op import OPS, Op

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None, reason="the native library is not available"
)
pytest.importorskip("fasttx._C", reason="fasttx._C is not built")

NONE = (None,) * 8
PLAIN = (0.25, 0.0, 0.0, -1, -1, False, 0)


def attention_args(B=2, H=3, S=5, D=8, Dv=None, dtype=torch.float32):
    q, k = torch.randn(2, B, H, S, D).to(dtype)
    return q, k, torch.randn(B, H, S, D if Dv is None else Dv).to(dtype), *NONE, *PLAIN


def norm_args(shape=(4, 24), dtypes=(torch.float32, None), rms=False, prenorm=False, wide=False):
    x = torch.randn(shape).to(dtypes[0])
    residual = None if dtypes[1] is None else torch.randn(shape).to(dtypes[1])
    weight = torch.randn(shape[-1])
    return x, residual, weight, None, None, None, 1e-5, 0.0, rms, prenorm, wide


def decode_args(B=2, H=4, S=1, D=8, T=16):
    q, lengths = torch.randn(B, H, S, D), torch.full((B,), T, dtype=torch.int32)
    return q, *torch.randn(2, B, H, T, D).unbind(), lengths, *(None,) * 6, 0.5, 0.0, -1, 0


def direct_of(name: str):
    """The op's direct call, learnt from a call through the dispatcher."""
    op = OPS[name]
    op(*{"attention_fwd": attention_args, "add_norm_fwd": norm_args,
         "attention_decode_fwd": decode_args}[name]())  # fmt: skip
    assert op.direct[None] is not None
    return op.direct[None]


CALLS = [
    ("attention_fwd", attention_args()),
    ("attention_fwd", attention_args(B=1, H=1, S=1, D=3)),
    ("attention_fwd", attention_args(Dv=12, dtype=torch.bfloat16)),
    ("attention_fwd", attention_args(S=0)),
    ("attention_fwd", attention_args(Dv=0)),
    ("attention_fwd", attention_args(B=0)),
    ("attention_fwd", tuple(t.transpose(1, 2) for t in attention_args()[:3]) + NONE + PLAIN),
    ("attention_decode_fwd", decode_args()),
    ("attention_decode_fwd", decode_args(B=1, S=3)),
    ("attention_decode_fwd", decode_args(S=0)),
    *(
        ("add_norm_fwd", norm_args(shape, dtypes, rms, prenorm, wide))
        for shape in ((24,), (3, 5), (2, 3, 7), (2, 1, 3, 4), (0, 6), (2, 0, 3, 4), (3, 0))
        for dtypes in ((torch.float32, None), (torch.bfloat16, torch.float16))
        for rms, prenorm, wide in ((False, False, False), (True, True, False), (False, True, True))
    ),
    ("add_norm_fwd", (norm_args((4, 6))[0].t().contiguous().t(), *norm_args((4, 6))[1:])),
    ("add_norm_fwd", norm_args((3, 8), (torch.bfloat16, torch.bfloat16), prenorm=True)),
    ("add_norm_fwd", norm_args((3, 8), (torch.bfloat16, torch.float32))),
]


@pytest.mark.parametrize(
    ("name", "args"), CALLS, ids=[f"{n} {i}" for i, (n, _) in enumerate(CALLS)]
)
def test_the_same_as_through_the_dispatcher(name, args):
    """Sizes, strides, dtypes and bits: what the library allocates is what `alloc` does."""
    op, direct = OPS[name], direct_of(name)
    got, expected = direct(args), op.overload(*args)
    assert got is not NotImplemented
    got, expected = ((t,) if isinstance(t, torch.Tensor) else t for t in (got, expected))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert torch.equal(a, b)


def leaf(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def heads(dtype=torch.float32, T=4):
    return leaf(2, T, 3, 8, dtype=dtype).transpose(1, 2)


def angles():
    return torch.randn(2, 4, 8).unbind()


def map_of(**options):
    q, k = (heads().detach() for _ in range(2))
    return fasttx.attention_map(q, k, torch.randn(2, 3, 4), **options)


IDS = torch.randint(0, 7, (2, 4))
TARGET = torch.randint(0, 9, (6,))
DOORS = {
    "attention": lambda: fasttx.attention(heads(), heads(), heads()),
    "attention mask": lambda: fasttx.attention(
        leaf(2, 3, 4, 8), heads(T=5), leaf(2, 3, 5, 6, grad=False), attn_mask=leaf(1, 1, 4, 5)
    ),
    "attention expanded": lambda: fasttx.attention(
        heads(), leaf(2, 1, 4, 8).expand(2, 3, 4, 8), heads(torch.float32)
    ),
    "map": map_of,
    "map of rows": lambda: map_of(rows=torch.tensor([1, 3])),
    "map of heads": lambda: map_of(heads=torch.tensor([2])),
    "map pooled": lambda: map_of(pool=2),
    "add_norm": lambda: fasttx.add_norm(
        leaf(2, 3, 8).mT.contiguous().mT, leaf(2, 3, 8), weight=leaf(8), bias=leaf(8)
    ),
    "add_norm dropout": lambda: fasttx.add_norm(
        leaf(2, 8, dtype=torch.bfloat16), leaf(2, 8), weight=None, x_bias=leaf(8), dropout_p=0.5
    ),
    "rms_norm": lambda: fasttx.rms_norm(leaf(5, 8, dtype=torch.float16)),
    "softmax": lambda: fasttx.softmax(leaf(2, 3, 4)),
    "softmax mask": lambda: fasttx.softmax(
        leaf(4, 2, 3).permute(1, 2, 0), mask=leaf(1, 3, 1), is_causal=True
    ),
    "softmax dim": lambda: fasttx.log_softmax(leaf(2, 3, 4, dtype=torch.bfloat16), dim=0),
    "softmax of a frozen": lambda: fasttx.softmax(leaf(3, 4, grad=False), mask=leaf(3, 1)),
    "cross_entropy": lambda: fasttx.cross_entropy(leaf(6, 9), TARGET),
    "cross_entropy none": lambda: fasttx.cross_entropy(
        leaf(9, 6, dtype=torch.bfloat16).t(), TARGET, reduction="none"
    ),
    "cross_entropy in place": lambda: fasttx.cross_entropy(
        leaf(6, 9) * 1, TARGET, inplace_grad=True
    ),
    "rope": lambda: fasttx.rope(heads(), heads(), *angles()),
    "rope contiguous": lambda: fasttx.rope(leaf(2, 3, 4, 8), leaf(2, 1, 4, 8), *angles()),
    "rope in place": lambda: fasttx.rope(
        leaf(2, 3, 4, 8, grad=False), leaf(2, 3, 4, 8, grad=False), *angles(), inplace=True
    ),
    "embed": lambda: fasttx.embed(IDS, leaf(7, 8)),
    "embed norm": lambda: fasttx.embed(
        IDS, leaf(7, 8), position_weight=leaf(4, 8, dtype=torch.bfloat16), norm_weight=leaf(8)
    ),
    "sample": lambda: fasttx.sample(torch.randn(3, 9), top_k=2),
}


def gradients_of(door: str):
    """Outputs and every leaf's gradient, from a fixed seed."""
    leaves = []
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as m:
        m.setitem(globals(), "leaf", lambda *s, **o: leaves.append(new_leaf(*s, **o)) or leaves[-1])
        outputs = DOORS[door]()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in outputs if t is not None and t.requires_grad]
    if wanted:
        sum(t.square().sum() for t in wanted).backward()
    return [t.detach() for t in outputs], [t.grad for t in leaves]


new_leaf = leaf


@pytest.mark.parametrize("door", DOORS)
def test_what_a_door_calls_directly(door, monkeypatch):
    """Every op that a door calls, forward and backward, makes what `alloc` does."""
    calls, call = [], Op.__call__

    def recorded(op, *args, backend=None):
        calls.append((op, args))
        return call(op, *args, backend=backend)

    gradients_of(door)  # what it calls is learnt
    with monkeypatch.context() as m:
        m.setattr(Op, "__call__", recorded)
        m.setattr(contract, "allocation_hook", lambda outputs: outputs)
        gradients_of(door)
    assert calls
    with torch.no_grad():
        for op, args in calls:
            direct = op.direct[None]
            got, expected = direct(args), op.alloc(*args)
            assert got is not NotImplemented
            got, expected = (t if isinstance(t, tuple) else (t,) for t in (got, expected))
            for a, b in zip(got, expected, strict=True):
                assert (a is None) == (b is None)
                if b is not None:
                    assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("door", DOORS)
def test_gradients_are_those_of_the_long_way(door, monkeypatch):
    """What csrc/direct_function.h does is what `forward`, `backward` and `save` say."""
    with monkeypatch.context() as m:
        m.setattr(contract, "allocation_hook", lambda outputs: outputs)
        long = gradients_of(door)
    gradients_of(door)
    direct = gradients_of(door)
    for expected, got in zip(long, direct, strict=True):
        for a, b in zip(expected, got, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


def test_a_training_call_takes_no_python_of_the_op():
    """Forward and backward of an op that names its arguments as data go from kernel to kernel."""
    x, w = leaf(3, 8), leaf(8)
    for _ in range(2):
        fasttx.layer_norm(x, weight=w).sum().backward()
    x.grad = w.grad = None
    called = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name))
    try:
        out = fasttx.layer_norm(x, weight=w).square().sum()
        out.backward()
    finally:
        sys.setprofile(None)
    assert "layer_norm" in called
    assert not {"_forward", "_backward", "_check", "_run"} & set(called)
    y, v = x.detach().requires_grad_(), w.detach().requires_grad_()
    torch.nn.functional.layer_norm(y, (8,), v).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(w.grad, v.grad)


@pytest.mark.filterwarnings("ignore:fasttx.softmax runs on the plain PyTorch reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_tensors_are_unpacked_once(dtype):
    """Where a direct call takes them and where it refuses them."""
    x, unpacked = leaf(3, 8), []
    fasttx.softmax(x).sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: unpacked.append(1) or t.to(dtype)
    ):
        out = fasttx.softmax(x)
    x.grad = None
    out.square().sum().backward()
    assert len(unpacked) == 2
    y = x.detach().requires_grad_()
    y.softmax(-1).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_a_changed_input_is_an_error():
    x, w = leaf(3, 8), leaf(8)
    for _ in range(2):
        out = fasttx.layer_norm(x * 1, weight=w)
    out.sum().backward()
    kept = x * 1
    out = fasttx.layer_norm(kept, weight=w)
    kept.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def changed(index: int, value) -> tuple:
    args = list(attention_args())
    args[index] = value(args[index]) if callable(value) else value
    return tuple(args)


REFUSED = {
    "subclass": changed(1, lambda t: t.as_subclass(Subclass)),
    "requires grad": changed(2, lambda t: t.requires_grad_()),
    "meta": changed(0, lambda t: t.to("meta")),
    "sparse": changed(0, lambda t: t.to_sparse()),
    "negated view": changed(0, torch._neg_view),
    "zero tensor": changed(0, lambda t: torch._efficientzerotensor(t.shape)),
    "functional": changed(0, torch._to_functional_tensor),
    "dtype": attention_args(dtype=torch.float64),
    "head size": attention_args(D=300),
    "not a float": changed(11, 1),
    "not a tensor": changed(0, None),
    "too few": attention_args()[:-1],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    assert direct_of("attention_fwd")(REFUSED[name]) is NotImplemented


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_refused_where_torch_must_see_the_call():
    direct, args, seen = direct_of("attention_fwd"), attention_args(), []

    def look(*_):
        seen.append(direct(args))
        return args[0] + 1

    for context in (Watching(), WatchingFunctions(), torch.profiler.profile()):
        with context:
            look()
    torch.func.vmap(look)(torch.zeros(2))
    torch.jit.trace(look, (args[0],), check_trace=False)
    assert seen == [NotImplemented] * 5
    assert direct(args) is not NotImplemented


def test_the_profiler_and_modes_see_the_op():
    x = attention_args()[:3]
    fasttx.attention(*x)
    with torch.profiler.profile() as profile:
        fasttx.attention(*x)
    assert any(e.key == "fasttx::attention_fwd" for e in profile.key_averages())


def test_grad_mode_without_gradients_and_inference_mode():
    direct, args = direct_of("attention_fwd"), attention_args()
    assert not direct(args)[0].requires_grad
    with torch.no_grad():
        assert direct(changed(0, lambda t: t.requires_grad_())) is not NotImplemented
    with torch.inference_mode():
        assert direct(args)[0].is_inference()
    parameter = changed(0, torch.nn.Parameter)
    with torch.no_grad():
        assert direct(parameter) is not NotImplemented


def test_guarded_tests_and_named_backends_take_the_long_way(monkeypatch):
    direct_of("attention_fwd")
    args, seen = attention_args(), []
    monkeypatch.setattr(contract, "allocation_hook", lambda outputs: seen.append(1) or outputs)
    OPS["attention_fwd"](*args)
    assert seen == [1]
    monkeypatch.setattr(contract, "allocation_hook", None)
    assert OPS["attention_fwd"].direct.get("reference") is None
    OPS["attention_fwd"](*args, backend="reference")
    assert OPS["attention_fwd"].direct.get("reference") is None
    OPS["attention_fwd"](*args, backend="cpu")
    assert OPS["attention_fwd"].direct["cpu"] is not None


def test_which_kernels_have_one():
    op, target = OPS["attention_fwd"], "native:attention_fwd_cpu"
    assert Kernel("cpu", target).direct(op) is not None
    assert Kernel("cpu", target, Needs(env=("A", "1"))).direct(op) is None
    assert Kernel("cpu", "native:no_such").direct(op) is None
    assert Kernel("reference", "fasttx.reference.attention:attention_fwd").direct(op) is None
    refuses = Kernel("cpu", target, Needs(absent=("mask", "softcap"))).direct(op)
    assert refuses(attention_args()) is not NotImplemented
    assert refuses(changed(12, 2.0)) is NotImplemented
    assert refuses(changed(3, torch.zeros(1, 1, 5, 5))) is NotImplemented


def test_an_op_that_changes_its_argument():
    """It runs directly, returns nothing, and its door counts the version."""
    x, out = torch.randn(3, 7), torch.full((3, 7), torch.nan)
    for _ in range(2):  # the first call finds the kernel
        before = out._version
        assert fasttx.softmax(x, out=out) is out
        assert out._version == before + 1
    torch.testing.assert_close(out, x.softmax(-1))
    direct = OPS["softmax_out"].direct[None]
    args = (out, x * 2, None, 1.0, False, False, False, False)
    assert direct(args) is None
    torch.testing.assert_close(out, (x * 2).softmax(-1))
    out.requires_grad_()
    with pytest.raises(ValueError, match="out must not require grad"):
        fasttx.softmax(x, out=out)


def test_errors_of_the_library():
    """What the binding itself refuses is an error."""
    with pytest.raises(RuntimeError, match="at most 4 dimensions, got 5"):
        direct_of("attention_fwd")(changed(0, lambda t: t[None]))


def test_no_leak():
    direct, args = direct_of("add_norm_fwd"), norm_args((4, 24), prenorm=True)
    for _ in range(10):
        direct(args)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(100):
        direct(args)
    gc.collect()
    assert len(gc.get_objects()) < before + 50
