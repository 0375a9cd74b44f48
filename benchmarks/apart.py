"""A contender in a process of its own, where two thread pools in one would fight.

It still takes its turns among the others: the parent says when, the child times itself, by the CPU
time of its whole process on one thread, by wall time on more. Messages are JSON lines.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from .fresh import PACKAGE, SOURCE_ROOT

NOTE = "in a process of its own: CPU time of that process on one thread, wall time on more"


class Apart:
    """make: "module:function" in this package; function(**arguments) gives the call, in the child.

    command: what runs this file in the child. Called, it runs once and returns what the child
    returned, as JSON has it. RuntimeError with the child's last line where it fails.
    """

    def __init__(
        self,
        make: str,
        arguments: dict[str, Any],
        threads: int,
        command: Sequence[str] = (sys.executable, "-m", f"{PACKAGE}.apart"),
    ):
        # A pipe that nobody reads would fill, and stop it.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        request = {"make": make, "arguments": arguments, "threads": threads}
        self._child = subprocess.Popen(
            [*command, json.dumps(request)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            cwd=SOURCE_ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        try:
            self.prepared_s = self._answer()
        except RuntimeError:
            self.close()
            raise

    def __call__(self, what: str = "call", **arguments: Any) -> Any:
        return self._ask({"do": what, "with": arguments})

    def measure(self, inner: int) -> tuple[float, bool]:
        """Seconds a call over ``inner`` calls, and whether a context switch disturbed them."""
        seconds, disturbed = self._ask({"do": "time", "inner": inner})
        return seconds, disturbed

    def close(self) -> None:
        if self._child.poll() is None:
            self._child.stdin.close()
            try:
                self._child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._errors):
            pipe.close()

    def _ask(self, message: dict) -> Any:
        with contextlib.suppress(BrokenPipeError):  # its last words are in _answer
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        for line in self._child.stdout:
            if line.startswith('{"answer"'):
                return json.loads(line)["answer"]
        status = self._child.wait()
        self._errors.seek(0)
        errors = self._errors.read().strip().splitlines()
        raise RuntimeError(errors[-1] if errors else f"it ended with {status}")


def _serve(request: dict) -> None:
    start = time.perf_counter()
    module, function = request["make"].split(":")
    make = getattr(importlib.import_module(f"{PACKAGE}.{module}"), function)
    calls = make(threads=request["threads"], **request["arguments"])
    _say(time.perf_counter() - start)
    one = request["threads"] == 1
    clock = time.process_time if one else time.perf_counter
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] != "time":
            _say(calls[asked["do"]](**asked["with"]))
            continue
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        begin = clock()
        for _ in range(asked["inner"]):
            calls["call"]()
        seconds = (clock() - begin) / asked["inner"]
        after = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        _say([seconds, not one and after > switches])


def _say(answer: Any) -> None:
    print(json.dumps({"answer": answer}), flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
