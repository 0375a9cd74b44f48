"""Items in a process of their own: a kernel that faults or hangs takes its process, not the run."""

from __future__ import annotations

import importlib
import multiprocessing
import time
import traceback

from .record import Item, Outcome

# After one of these the CUDA context is lost for every later call of its process.
_FATAL = ("CUDA error", "AcceleratorError", "illegal memory access", "device-side assert")
_TAIL = 1500


class Refused(RuntimeError):
    """The device, its driver or the machine does not allow this."""


class Worker:
    """Runs items one after the other, in a fresh process after a crash, a time-out or a CUDA
    fault."""

    def __init__(self):
        self._process = self._pipe = None

    def run(self, item: Item) -> Outcome:
        start = time.monotonic()
        status, message, result = self._ask(item)
        failures = result.pop("failures", [])
        if status == "ok" and failures:
            status, message = "failed", f"{len(failures)} failed"
        seconds = round(time.monotonic() - start, 2)
        return Outcome(item.part, status, seconds, item.reproduce, message, result, failures)

    def _ask(self, item: Item) -> tuple[str, str, dict]:
        if self._process is None:
            self._start()
        self._pipe.send((item.function, item.arguments))
        try:
            if not self._pipe.poll(item.seconds):
                self.stop()
                return "failed", f"no answer in {item.seconds:.0f} s", {}
            status, message, result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            self.stop()
            return "failed", f"the process died with exit code {code}", {}
        if any(word in message for word in _FATAL):
            self.stop()
        return status, message, result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child,))
        self._process.start()
        child.close()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None


def _serve(pipe) -> None:
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        module, _, name = function.partition(":")
        try:
            result = getattr(importlib.import_module(module), name)(**arguments)
            pipe.send(("ok", "", result))
        except Refused as reason:
            pipe.send(("refused", str(reason), {}))
        except Exception:
            pipe.send(("failed", traceback.format_exc()[-_TAIL:], {}))
