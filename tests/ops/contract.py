"""What the tests of every op ask alike: on each backend, by torch.library, compiled, refused."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttx.op import Op
from tests.conftest import unusable

BACKENDS = ("reference", "cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backend_fixture(op: str, backends: tuple[str, ...] = BACKENDS):
    """A fixture `backend`: each in turn, skipped with the reason where it has no kernel of op."""

    @pytest.fixture(params=backends)
    def backend(request) -> str:
        skip_unusable(op, request.param)
        return request.param

    return backend


def skip_unusable(op: str, backend: str) -> None:
    if reason := unusable(op, backend):
        pytest.skip(f"{backend}: {reason}")


def parameter(*values, slow: bool):
    """A pytest.param named by its backend, dtype and case (a string, or something named)."""
    words = [
        str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else getattr(v, "name", v)
        for v in values
    ]
    return pytest.param(*values, id="-".join(words), marks=pytest.mark.slow if slow else ())


def unless_quick(backend: str, case, dtype: torch.dtype) -> bool:
    """Triton's interpreter takes about a second a case."""
    return backend == "triton" and (not case.quick or dtype is torch.float16)


def every_case(
    cases: Iterable, slow: Callable = unless_quick, backends: tuple[str, ...] = BACKENDS
) -> Iterator:
    """(backend, dtype, case) for parametrize; marked slow where slow(backend, case, dtype)."""
    for backend, case, dtype in itertools.product(backends, cases, DTYPES):
        yield parameter(backend, dtype, case, slow=slow(backend, case, dtype))


def opcheck(op: Op, args: tuple) -> None:
    """A recorded call: the fake's shapes, strides and dtypes are the call's, and
    torch.library.opcheck has nothing to say."""
    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    if not op.mutates:
        with FakeTensorMode() as mode:
            fake = op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])
        real = op(*args)
        if isinstance(real, Tensor):
            fake, real = (fake,), (real,)
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    torch.library.opcheck(op.overload, args, {"backend": None})


def check_compiled(
    function: Callable[..., Tensor],
    arguments: Callable[[int], list[Tensor]],
    dynamic: bool,
    sizes: tuple[int, ...] = (5, 9, 17),
    **tolerances: float,
) -> None:
    """torch.compile(function) of arguments(size) and its gradients are the eager ones: of the
    first size, or compiled once for all."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in sizes if dynamic else sizes[:1]:
        given = arguments(size)
        got, expected = compiled(*given), function(*given)
        torch.testing.assert_close(got, expected)
        if expected.requires_grad:
            leaves = [t for t in given if t.requires_grad]
            grads = [torch.autograd.grad(t.square().sum(), leaves) for t in (got, expected)]
            torch.testing.assert_close(*grads, **tolerances)


def refused(
    monkeypatch: pytest.MonkeyPatch,
    function: Callable,
    row: tuple[type[Exception], str, dict],
    **good,
) -> None:
    """function(**good), changed as row = (error, text, arguments) says, raises before any op
    runs."""

    def ran(self, *args, **kwargs):
        pytest.fail(f"{self.name} ran")

    monkeypatch.setattr(Op, "__call__", ran)
    error, text, arguments = row
    with pytest.raises(error, match=text):
        function(**{**good, **arguments})
