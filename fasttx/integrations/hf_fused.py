"""What the modules of several families do alike, computed around their submodules.

Fusing reads a submodule's parameters and never calls it, so it is done only where the submodule is
`is_plain`, looked at in every call; everything else is called as transformers calls it.
"""

from torch import Tensor, nn

from ..ops.add_norm import add_norm, layer_norm

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """module is of exactly one of classes (so no adapter, quantized or parametrized form of it),
    carries no hooks and no forward of its own."""
    return type(module) in classes and not has_hooks(module) and "forward" not in vars(module)


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        if len(self.normalized_shape) != 1:
            return super().forward(input)
        return layer_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)


def residual_norm(norm: nn.Module, x: Tensor, residual: Tensor, dropout_p: float) -> Tensor:
    """norm(residual + dropout(x)) for a LayerNorm; dropout_p is 0 in evaluation."""
    if is_plain(norm, nn.LayerNorm, LayerNorm) and len(norm.normalized_shape) == 1:
        return add_norm(
            x, residual, weight=norm.weight, bias=norm.bias, dropout_p=dropout_p, eps=norm.eps
        )
    return norm(residual + nn.functional.dropout(x, dropout_p, dropout_p > 0))


def dropout_p(dropout: nn.Module) -> float | None:
    """What an nn.Dropout drops now; None if it is anything else."""
    if not is_plain(dropout, nn.Dropout) or dropout.inplace:
        return None
    return dropout.p if dropout.training else 0.0


def rms_normed(x: Tensor, weight: Tensor, eps: float, norm) -> Tensor:
    """norm(x, weight=weight, eps=eps) as T5 rounds it: in weight's dtype where that has 16 bits,
    else in float32 at least."""
    if x.dtype is weight.dtype:
        return norm(x, weight=weight, eps=eps)
    if weight.dtype.itemsize == 2:
        return norm(x, weight=weight, eps=eps).to(weight.dtype)
    return norm(x.to(weight.dtype), weight=weight, eps=eps)
