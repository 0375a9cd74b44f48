"""The contract of an op.

One annotated `alloc` function an op direction. Its annotations are the schema; under a fake or meta
tensor it is the fake kernel; in the real body it allocates the outputs, and the first kernel of the
op's ordered table whose `Needs` has no reason to refuse fills them. So fake and real cannot drift,
and every backend has one calling convention: `kernel(*outputs, *args)`, fill every element, return
nothing.
"""

import contextlib
import os
import warnings
from collections.abc import Callable
from contextvars import ContextVar

import torch

from .choice import asked, fastest, promoted
from .kernel import FLOATS, HALF, Kernel, Needs

__all__ = ["FLOATS", "HALF", "LIB", "OPS", "Kernel", "Needs", "Op", "strict"]

LIB = torch.library.Library("fasttx", "DEF")
OPS: dict[str, "Op"] = {}

# A test replaces freshly allocated outputs through this, to poison and guard them.
allocation_hook: Callable[[tuple], tuple] | None = None
# While `explain` runs a door under fake tensors, the calls it made.
captured: ContextVar[list | None] = ContextVar("captured", default=None)
_told: set[str] = set()
_NO_GUARD = contextlib.nullcontext()


def strict() -> bool:
    """FASTTX_STRICT=1: running the reference because every kernel refused is an error, not a
    warning."""
    return os.environ.get("FASTTX_STRICT", "0") not in ("", "0")


class Op:
    """`torch.ops.fasttx.<name>`: schema and fake from `alloc`, body from the first fit kernel."""

    def __init__(self, alloc: Callable, mutates: tuple[str, ...] = ()):
        self.name, self.alloc, self.mutates = alloc.__name__, alloc, mutates
        self.tables: dict[str, list[Kernel]] = {}
        self.direct: dict[str | None, Callable | None] = {}
        self.promoted: dict[tuple[str, str], list[Kernel]] = {}
        self.backward: Op | None = None
        self.public = self.name.rpartition("_")[0] or self.name
        arguments, _, returns = torch.library.infer_schema(alloc, mutates_args=mutates).rpartition(
            ") ->"
        )
        LIB.define(f"{self.name}{arguments}, *, str? backend=None) ->{returns}")
        LIB.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fasttx::{self.name}", self._fake, lib=LIB)
        self.overload = getattr(torch.ops.fasttx, self.name).default
        self.at = {a.name: i for i, a in enumerate(self.overload._schema.arguments)}
        OPS[self.name] = self

    def __call__(self, *args, backend: str | None = None):
        # What is known to end in the first kernel goes there without the dispatcher.
        if not torch.compiler.is_compiling() and allocation_hook is None:
            direct = self.direct.get(backend)
            if direct is not None and (outputs := direct(args)) is not NotImplemented:
                return outputs
        return self.overload(*args, backend=backend)

    def kernels(self, **tables: list[Kernel]) -> None:
        """The ordered tables, one a device type; the first kernel that does not refuse runs."""
        self.tables, self.direct, self.promoted = tables, {}, {}

    def backends(self) -> list[str]:
        return list(dict.fromkeys(k.backend for table in self.tables.values() for k in table))

    def _fake(self, *args, backend=None):
        if (calls := captured.get()) is not None:
            calls.append((self, args, backend))
        return self.alloc(*args)

    def _run(self, *args, backend=None):
        if torch.is_grad_enabled():
            for a in args:
                if isinstance(a, torch.Tensor) and a.requires_grad:
                    raise RuntimeError(
                        f"torch.ops.fasttx.{self.name} has no gradient of its own and was called "
                        f"on an input that requires grad: call fasttx.{self.public}"
                    )
        kernel, device = self.pick(args, backend), args[0].device
        with torch.cuda.device(device) if device.type == "cuda" else _NO_GUARD:
            outputs = self.alloc(*args)
            nothing = outputs is None
            filled = outputs if isinstance(outputs, tuple) else () if nothing else (outputs,)
            if allocation_hook is not None and not nothing:
                filled = allocation_hook(filled)
                outputs = filled if isinstance(outputs, tuple) else filled[0]
            kernel.function(*filled, *args)
        if backend not in self.direct and kernel is self.tables.get("cpu", (None,))[0]:
            call = kernel.direct(self)
            self.direct[backend] = call if backend else asked(self, call)
        return outputs

    def table(self, args: tuple) -> list[Kernel]:
        """The kernels for this device, what was measured to be the fastest for the call first."""
        device = args[0].device.type
        table = self.tables.get(device, [])
        if (best := fastest(self.name, args, self.at)) is None:
            return table
        if (device, best) not in self.promoted:
            self.promoted[device, best] = promoted(table, best)
        return self.promoted[device, best]

    def pick(self, args: tuple, backend: str | None = None) -> Kernel:
        """The kernel that runs this call; NotImplementedError with every reason if none does."""
        for kernel in self.table(args):
            asked = kernel.backend == backend if backend else not kernel.needs.by_name
            if asked and kernel.refuse(args, self.at) is None:
                if backend is None and kernel.backend == "reference":
                    self._tell_reference(args)
                return kernel
        raise NotImplementedError(
            f"fasttx.{self.public}: no kernel of backend={backend!r} runs this call on "
            f"{args[0].device.type}\n" + self._reasons(args)
        )

    def refusals(self, args: tuple) -> list[tuple[Kernel, str | None]]:
        """Every kernel for this device with its reason to refuse the call, or None."""
        return [(k, k.refuse(args, self.at)) for k in self.table(args)]

    def _reasons(self, args: tuple) -> str:
        return "\n".join(f"  {k.backend}: {r or 'supports it'}" for k, r in self.refusals(args))

    def _tell_reference(self, args: tuple) -> None:
        text = (
            f"fasttx.{self.public} runs on the plain PyTorch reference, in O(S x T) memory, "
            f"because\n" + self._reasons(args)
        )
        if strict():
            raise RuntimeError(text + "\n(FASTTX_STRICT=1)")
        if self.name not in _told:
            _told.add(self.name)
            warnings.warn(text, RuntimeWarning, stacklevel=2)
