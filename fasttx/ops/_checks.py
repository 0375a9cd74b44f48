"""Checks and defaults that the doors of several ops share."""

import torch
from torch import Tensor

BACKENDS = ("cpu", "cuda", "triton", "reference", "torch")
FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
# The dtypes that may stand beside one in a call: float64 stands alone.
KINDRED = {t: FLOATS & {t} if t is torch.float64 else FLOATS - {torch.float64} for t in FLOATS}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def number(name: str, value, allowed: str) -> Exception:
    """The error for a number out of range, or for what is no number."""
    kind = ValueError if isinstance(value, (int, float)) else TypeError
    return kind(f"{name} must be {allowed}, got {value!r}")


def check_backend(backend, allowed: tuple[str, ...] = BACKENDS) -> None:
    if backend is not None and backend not in allowed:
        raise ValueError(f"backend must be None or one of {', '.join(allowed)}, got {backend!r}")


def check_float(name: str, t) -> None:
    """t is a tensor of float32, bfloat16, float16 or float64."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {short(t.dtype)}"
        )


def check_dropout(p, name: str = "dropout_p") -> None:
    if p != 0.0 and (not isinstance(p, (int, float)) or not 0.0 <= p < 1.0):
        raise number(name, p, "in [0, 1)")


def seed_tensor(seed, device: torch.device, owner: str = "x") -> Tensor:
    """The int64 tensor of one element that keys the dropout bits; None draws it from torch's
    generator."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed must be an int64 tensor of one element, got {short(seed.dtype)} "
                f"{tuple(seed.shape)}"
            )
        if seed.device != device:
            raise ValueError(f"seed must be on {owner}'s device {device}, got {seed.device}")
        return seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(
            f"seed must be a 64-bit int, an int64 tensor of one element or None, got {seed!r}"
        )
    # No copy from the host, which would wait for the device and could not be captured in a graph.
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for the device's type; asking for any type first costs least."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device.type)


def extremes(t: Tensor) -> tuple[int, int]:
    """The least and the greatest of a tensor's integers, at least one."""
    if t.numel() <= 64 and t.is_cpu:  # without a kernel
        values = t.reshape(-1).tolist()
        return min(values), max(values)
    low, high = t.aminmax()
    return int(low), int(high)


def has_values(t: Tensor) -> bool:
    """Whether reading t's values is possible and free: a real CPU tensor outside tracing and
    transforms."""
    return (
        not torch.compiler.is_compiling()
        and type(t) is Tensor
        and t.is_cpu
        and not torch._C._are_functorch_transforms_active()
    )
