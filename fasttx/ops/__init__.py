"""One file an op: formula and shapes, forward and backward declarations, ordered kernel table,
autograd, the public function."""

from .attention import ALiBi, RelativePositionBias, attention

__all__ = ["ALiBi", "RelativePositionBias", "attention"]
