"""The gate: no speed without the right answer.

Errors are against fp64. A provider passes when every tensor it returns is finite where the fp64
answer is and, both in relative RMS and in its largest element, errs at most ``FACTOR`` times as
much as plain PyTorch in the same dtype (``GRAD_FACTOR`` for gradients), plus one rounding (eps, as
in ``fasttx.testing``). The yardstick is the formula written out; the largest single error depends
on chance, so there it is the worse of that formula and SDPA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

FACTOR = 2.0
GRAD_FACTOR = 3.0
# Relative RMS difference up to which two kernels gave the same answer, where speed alone is asked.
AGREE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Error:
    """Distance of one tensor from its fp64 value; scale = max |expected|."""

    rms: float
    largest: float
    scale: float

    @staticmethod
    def between(actual: Tensor, expected: Tensor) -> Error:
        """rms = |actual - expected| / |expected|; largest = max |actual - expected|."""
        if actual.shape != expected.shape:
            return Error(float("inf"), float("inf"), 0.0)
        if expected.numel() == 0:
            return Error(0.0, 0.0, 0.0)
        difference = actual.detach().double() - expected.double()
        largest = difference.abs().max().item()
        if largest != largest:
            return Error(float("inf"), float("inf"), expected.abs().max().item())
        norm = expected.double().norm().item()
        distance = difference.norm().item()
        rms = distance / norm if norm > 0 else (0.0 if distance == 0 else float("inf"))
        return Error(rms, largest, expected.abs().max().item())


@dataclass
class Verdict:
    """ok: True passes, False fails, None could not be checked (``why`` says for what reason)."""

    ok: bool | None
    errors: dict[str, Error] = field(default_factory=dict)
    plain: dict[str, Error] = field(default_factory=dict)
    why: str = ""

    @property
    def worst(self) -> float | None:
        """The largest relative RMS error over the tensors checked."""
        return max((error.rms for error in self.errors.values()), default=None)

    @property
    def mark(self) -> str:
        return {True: "✓", False: "✗", None: "-"}[self.ok]


def judge(errors: Mapping[str, Error], plain: Mapping[str, Error], dtype: torch.dtype) -> Verdict:
    """Compares a provider's errors with plain PyTorch's; names starting with d are gradients."""
    rounding = torch.finfo(dtype).eps
    wrong = []
    for name, error in errors.items():
        factor = GRAD_FACTOR if name.startswith("d") else FACTOR
        yardstick = plain[name]
        rms_limit = factor * yardstick.rms + rounding
        largest_limit = factor * yardstick.largest + rounding * error.scale
        if not error.rms <= rms_limit:
            wrong.append(f"{name}: relative RMS error {error.rms:.2e} over {rms_limit:.2e}")
        elif not error.largest <= largest_limit:
            wrong.append(f"{name}: largest error {error.largest:.2e} over {largest_limit:.2e}")
    return Verdict(not wrong, dict(errors), dict(plain), "; ".join(wrong))


def unchecked(why: str) -> Verdict:
    return Verdict(None, why=why)
