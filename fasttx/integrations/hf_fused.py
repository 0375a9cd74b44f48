"""What the modules of several families do alike, computed around their submodules.

Fusing reads a submodule's parameters and never calls it, so it is done only where the submodule is
`is_plain`, looked at in every call; everything else is called as transformers calls it.
"""

import torch
from torch import Tensor, nn
from transformers import pytorch_utils

from ..ops.add_norm import add_norm, layer_norm
from ..ops.ffn import ffn
from ..ops.linear import linear

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """module is of exactly one of classes (so no adapter, quantized or parametrized form of it),
    carries no hooks and no forward of its own."""
    return type(module) in classes and not has_hooks(module) and "forward" not in vars(module)


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS)


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        if len(self.normalized_shape) != 1:
            return super().forward(input)
        return layer_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if not _pays(input, [self]):
            return super().forward(input)
        return linear(input, self.weight, self.bias)


class Conv1D(pytorch_utils.Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        if not _pays(x, [self]):
            return super().forward(x)
        return linear(x, self.weight.t(), self.bias)


LINEARS = (nn.Linear, Linear)
CONVS = (pytorch_utils.Conv1D, Conv1D)


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


# transformers' activation classes by fasttx's names
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "BloomGelu": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


def feed_forward(
    x: Tensor,
    up: nn.Module,
    act: nn.Module,
    down: nn.Module,
    *,
    gate: nn.Module | None = None,
    hidden_dropout_p: float | None = 0.0,
    dropout_p: float | None = 0.0,
) -> Tensor | None:
    """dropout(down(dropout(act(up(x)) * gate(x)))) in one op; None where it cannot be or does not
    pay."""
    name = _ACTIVATIONS.get(type(act).__name__)
    weights = [m for m in (up, down, gate) if m is not None]
    if (
        name is None
        or hidden_dropout_p is None
        or dropout_p is None
        or not is_plain(act, type(act))
        or not all(is_plain(m, *LINEARS, *CONVS) for m in weights)
        or not _pays(x, weights)
    ):
        return None
    return ffn(
        x,
        _weight(up),
        up.bias,
        _weight(down),
        down.bias,
        activation=name,
        w_gate=None if gate is None else _weight(gate),
        b_gate=None if gate is None else gate.bias,
        hidden_dropout_p=hidden_dropout_p,
        dropout_p=dropout_p,
    )


def _weight(module: nn.Module) -> Tensor:
    return module.weight.t() if type(module) in CONVS else module.weight


def _pays(x: Tensor, weights: list[nn.Module]) -> bool:
    """Whether fasttx's products and what is fused to them beat torch's: on a CPU. Forward 1.0 to
    2.8 times as fast; a step of 64 to 4096 rows of 768 x 3072 2.0 to 2.8 times in float32, 1.0 to
    1.3 times in bfloat16 (1.7 with GPT-2's gelu), 40 times in float16. Zen 5, one thread."""
    if x.device.type != "cpu":
        return False
    return torch.is_autocast_enabled("cpu") or all(m.weight.dtype is x.dtype for m in weights)
