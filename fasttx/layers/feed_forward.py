"""Linear, as torch.nn has it, and the feed-forward layer of a transformer."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.ffn import ffn
from ..ops.linear import linear
from ._fit import dropout_p, fit_autocast, untouched

__all__ = ["FeedForward", "Linear"]

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Linear(nn.Linear):
    """torch.nn.Linear on fasttx.linear: y = x weight^T + bias. Constructor, parameters, state_dict
    and errors are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        fits = (
            fit_autocast(input, self.weight, self.bias)
            and input.dim() > 0
            and input.shape[-1] == self.in_features
        )
        if not fits:
            return super().forward(input)
        return project(input, self.weight, self.bias)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias. On a GPU without anything to fuse that is the vendor's product."""
    if x.is_cpu:
        return linear(x, weight, bias)
    return F.linear(x, weight, bias)


class FeedForward(nn.Module):
    """dropout(linear2(dropout(act(linear1(x))))), or with a gate
    linear2(dropout(act(linear1(x)) * gate(x))), in one op.

    Args:
        d_model, dim_feedforward: widths of input and output, and of the hidden layer.
        dropout: of the hidden layer, in training.
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu", or any callable.
        bias: of the linear maps.
        gated: a second linear map whose result multiplies the activated one (T5 v1.1's wi_1,
            Llama's up_proj).
        recompute: keep only x for the backward.

    Parameters: linear1, linear2 (as in torch.nn.TransformerEncoderLayer) and gate. x [..., d_model]
    gives [..., d_model]. Where a part was replaced or carries hooks, the parts run one by one.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        *,
        dropout: float = 0.0,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        bias: bool = True,
        gated: bool = False,
        recompute: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be callable or one of {', '.join(map(repr, ACTIVATIONS))}, got "
                f"{activation!r}"
            )
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.linear1 = Linear(d_model, dim_feedforward, **options)
        self.gate = Linear(d_model, dim_feedforward, **options) if gated else None
        self.linear2 = Linear(dim_feedforward, d_model, **options)
        self.dropout = nn.Dropout(dropout)
        self.activation, self.recompute = activation, recompute

    def forward(self, x: Tensor) -> Tensor:
        linears = (self.linear1, self.linear2, *(() if self.gate is None else (self.gate,)))
        if (
            fit_autocast(x, *(p for part in linears for p in (part.weight, part.bias)))
            and x.shape[-1] == self.linear1.in_features
            and all(untouched(part, Linear) for part in linears)
            and untouched(self.dropout, nn.Dropout)
            and self.dropout.p < 1
        ):
            return feed_forward(
                x,
                self.linear1,
                self.activation,
                self.dropout,
                self.linear2,
                self.gate,
                self.recompute,
            )
        act = self.activation
        hidden = (ACTIVATIONS[act] if isinstance(act, str) else act)(self.linear1(x))
        hidden = hidden if self.gate is None else hidden * self.gate(x)
        return self.linear2(self.dropout(hidden))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def activation_name(activation: str | Callable) -> str | None:
    """The name under which fasttx.ffn knows an activation: its name, its function or its module;
    None if it does not know it."""
    if isinstance(activation, str):
        return activation
    if activation is F.relu or type(activation) is nn.ReLU:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if activation is F.silu or type(activation) is nn.SiLU:
        return "silu"
    return None


def feed_forward(
    x: Tensor,
    linear1: nn.Linear,
    activation: str | Callable,
    dropout: nn.Dropout,
    linear2: nn.Linear,
    gate: nn.Linear | None = None,
    recompute: bool = False,
) -> Tensor:
    """linear2(dropout(activation(linear1(x)) * gate(x))) for inputs that were checked."""
    name, p = activation_name(activation), dropout_p(dropout)
    if name is not None:
        return ffn(
            x,
            linear1.weight,
            linear1.bias,
            linear2.weight,
            linear2.bias,
            activation=name,
            w_gate=None if gate is None else gate.weight,
            b_gate=None if gate is None else gate.bias,
            hidden_dropout_p=p,
            recompute=recompute,
        )
    hidden = activation(project(x, linear1.weight, linear1.bias))
    if gate is not None:
        hidden = hidden * project(x, gate.weight, gate.bias)
    return project(F.dropout(hidden, p, p > 0), linear2.weight, linear2.bias)
