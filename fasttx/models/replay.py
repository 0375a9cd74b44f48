"""A decoding step on the CPU recorded once and made again without Python in between: what a CUDA
graph is on a GPU.

The recorded calls read and write the same memory every time, so what changes from step to step must
be in tensors (the token, the lengths of the cache), not in Python numbers.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import native
from .. import op as contract

__all__ = ["Recording", "record"]


class Recording:
    """run() makes the calls again and returns the result, in the same memory every time."""

    def __init__(self, calls: list["_Call"], result: Tensor):
        from .. import _C

        self.result, self.program = result, _C.Program()
        self.parts: list[tuple[int, int] | Callable] = []
        for call in calls:
            before = len(self.program)
            if call.native is None or not self.program.add(*call.native):
                self.parts.append(call.again)
            elif self.parts and isinstance(self.parts[-1], tuple):
                self.parts[-1] = (self.parts[-1][0], before + 1)
            else:
                self.parts.append((before, before + 1))

    def run(self) -> Tensor:
        for part in self.parts:
            if isinstance(part, tuple):
                self.program.run(*part)
            else:
                part()
        return self.result


def record(function: Callable[[], Tensor]) -> tuple[Tensor, Recording | None]:
    """function's result, and its recording where everything it did can be made again: None where a
    value was read back or drawn, or an op changed something in a way that is not known."""
    if native.unavailable() or contract.allocation_hook is not None:
        return function(), None
    with _Recorder() as recorder:
        result = function()
    if recorder.reason is not None:
        return result, None
    return result, Recording(_needed(recorder.calls, result), result)


class _Call:
    """One call. native: (name, outputs, inputs) in libfasttx, or None; again: the same in Python;
    reads, writes: tensors; changes: whether it writes what was there before."""

    def __init__(self, again, reads, writes, native=None, changes=False):
        self.again, self.native, self.changes = again, native, changes
        self.reads, self.writes = _storages(reads), _storages(writes)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[_Call] = []
        self.reason: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if _values_read(out):
            if not _in_a_door():
                self.reason = "a value was read"
        elif func is torch.ops.aten.detach_.default:
            pass  # no memory changes
        elif func._schema.is_mutable or not _storages(out) <= _storages((args, kwargs)):
            if torch.Tag.nondeterministic_seeded in func.tags:
                self.reason = f"{func} draws numbers"
            self.calls.append(_call(func, args, kwargs, out))
        return out


def _call(func, args: tuple, kwargs: dict, out) -> _Call:
    """What is no view of its arguments: it fills new tensors, or writes into arguments."""
    schema = func._schema
    own = contract.OPS.get(schema.name.rpartition("::")[2]) if func.namespace == "fasttx" else None
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    if schema.is_mutable:
        changed = [
            given[a.name]
            for a in schema.arguments
            if a.name in given and a.alias_info is not None and a.alias_info.is_write
        ]
        native_call = _native(own, args, kwargs, ()) if own else None
        return _Call(lambda: func(*args, **kwargs), (args, kwargs), changed, native_call, True)
    outputs = out if isinstance(out, (tuple, list)) else (out,)

    def again():
        new = func(*args, **kwargs)
        for old, fresh in zip(outputs, (new,) if isinstance(new, Tensor) else new, strict=True):
            old.copy_(fresh)

    native_call = _native(own, args, kwargs, outputs) if own else None
    return _Call(again, (args, kwargs), outputs, native_call)


def _native(own, args: tuple, kwargs: dict, outputs) -> tuple | None:
    room, _, name = own.pick(args, kwargs.get("backend")).target.partition(":")
    return (name, tuple(outputs), tuple(args)) if room == "native" else None


def _needed(calls: list[_Call], result: Tensor) -> list[_Call]:
    """Without the calls whose outputs nobody reads: the checks of values at the ops' doors."""
    used, kept = _storages(result), []
    for call in reversed(calls):
        if call.changes or used & call.writes:
            used |= call.reads
            kept.append(call)
    return kept[::-1]


def _storages(values) -> set[int]:
    if isinstance(values, Tensor):
        return {values.untyped_storage()._cdata} if values.numel() else set()
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return set()
    return set().union(*(_storages(v) for v in values))


def _values_read(out) -> bool:
    parts = out if isinstance(out, (tuple, list)) else () if out is None else (out,)
    return any(not isinstance(part, Tensor) for part in parts)


def _in_a_door() -> bool:
    """Whether a function of fasttx.ops is at work: it reads values to check them, for nothing
    else."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("fasttx.ops."):
            return True
        frame = frame.f_back
    return False
