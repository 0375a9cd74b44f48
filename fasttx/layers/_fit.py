"""Whether a call, or a part of a module, is one that the fused ops run.

Where it is not, a drop-in calls the forward of its torch class: what torch supports stays supported
(nested tensors, float64, modules put in the place of others), and what torch refuses it refuses in
torch's own words.
"""

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
MAX_HEAD_SIZE = 256


def fit(*tensors) -> bool:
    """Plain tensors of one dtype that kernels know; None is passed over."""
    given = [t for t in tensors if t is not None]
    dtype = given[0].dtype if isinstance(given[0], Tensor) else None
    return dtype in DTYPES and all(
        isinstance(t, Tensor) and t.dtype is dtype and not t.is_nested for t in given
    )


def fit_autocast(x: Tensor, *parameters: Tensor | None) -> bool:
    """As `fit`, for parameters beside x; under autocast, which casts them, dtypes may differ."""
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        return fit(x) and all(p is None or p.dtype in DTYPES for p in parameters)
    return fit(x, *parameters)


def untouched(module: nn.Module, *classes: type) -> bool:
    """Whether a module is exactly of a class and nobody listens to it, so that its parameters may
    be used without calling it: no hooks, adapters, parametrizations or quantization."""
    return type(module) in classes and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def dropout_p(module: nn.Dropout) -> float:
    return module.p if module.training else 0.0
