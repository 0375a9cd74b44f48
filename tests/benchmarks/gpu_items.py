"""What the worker process of the GPU runs is given in tests of it."""

import os
import time

from fasttx.benchmarks.gpu.isolate import Refused


def double(x: int) -> dict:
    return {"y": 2 * x, "process": os.getpid()}


def fail(text: str) -> dict:
    raise RuntimeError(text)


def refuse() -> dict:
    raise Refused("Device not supported")


def die() -> dict:
    os._exit(7)


def sleep() -> dict:
    time.sleep(60)
    return {}


def partly() -> dict:
    return {"done": 3, "failures": [{"what": "one", "message": "no", "reproduce": "try one"}]}
