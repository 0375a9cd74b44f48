"""fasttx: fused transformer kernels (Triton, C++ SIMD) behind PyTorch autograd, as ops and as a
patch of existing models."""

from .explain import explain
from .integrations.hf import patch, unpatch
from .ops import ALiBi, RelativePositionBias, attention, cross_entropy

__version__ = "0.1.0"
__all__ = [
    "ALiBi",
    "RelativePositionBias",
    "attention",
    "cross_entropy",
    "explain",
    "patch",
    "unpatch",
]
