"""fasttx: fused transformer kernels (Triton, C++ SIMD) behind PyTorch autograd, as ops and as a patch of existing models."""

from .explain import explain
from .ops import ALiBi, RelativePositionBias, attention

__version__ = "0.1.0"
__all__ = ["ALiBi", "RelativePositionBias", "attention", "explain", "patch", "unpatch"]


def __getattr__(name: str):
    if name in ("patch", "unpatch"):
        from .integrations import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
