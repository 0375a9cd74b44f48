"""LayerNorm and RMSNorm over the last dimensions, as torch.nn has them."""

import torch
from torch import Tensor, nn

from ..ops.add_norm import layer_norm, rms_norm
from ._fit import fit

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm on fasttx.layer_norm: y = (x - mean) / sqrt(var + eps) * weight + bias.

    Constructor, parameters, state_dict and errors are torch's; x is float32, bfloat16 or float16
    there, and anything else runs on torch. Source: Ba et al., arXiv 1607.06450.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _fits(self, input, self.weight, self.bias):
            return super().forward(input)
        x, weight, bias = _flat(self, input, self.weight, self.bias)
        return layer_norm(x, weight=weight, bias=bias, eps=self.eps).view(input.shape)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm on fasttx.rms_norm: y = x / sqrt(mean(x^2) + eps) * weight.

    Constructor, parameters, state_dict and errors are torch's; eps=None is the machine epsilon of
    x's dtype. Source: Zhang and Sennrich, arXiv 1910.07467.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _fits(self, x, self.weight, None):
            return super().forward(x)
        flat, weight, _ = _flat(self, x, self.weight, None)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(flat, weight=weight, eps=eps).view(x.shape)


def _fits(module, x, weight, bias) -> bool:
    shape = module.normalized_shape
    return (
        fit(x)
        and len(shape) > 0
        and x.dim() >= len(shape)
        and x.shape[-len(shape) :] == shape
        and x.shape[-1] > 0
        and all(p is None or (p.dtype is x.dtype and p.device == x.device) for p in (weight, bias))
    )


def _flat(module, x, *parameters):
    """The normalized dimensions as one."""
    dims = len(module.normalized_shape)
    if dims == 1:
        return x, *parameters
    return x.flatten(-dims), *(None if p is None else p.flatten() for p in parameters)
