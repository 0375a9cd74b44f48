"""Where a token stands: biases of attention, rotations of queries and keys."""

import torch
from torch import Tensor, nn

from ..ops.attention import ALiBi, RelativePositionBias

__all__ = ["ALiBiBias", "RelativeBias", "Rotary"]


class ALiBiBias(nn.Module):
    """The fixed slopes of ALiBi for `position_bias`; nothing is learned or saved.

    forward(mask=None): with a padding mask [B,T], True or 1 for real tokens, key positions count
    real tokens alone, as in BLOOM. Source: Press et al., arXiv 2108.12409.
    """

    def __init__(self, heads: int, device=None):
        super().__init__()
        slopes = ALiBi.standard_slopes(heads, device)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, mask: Tensor | None = None) -> ALiBi:
        if mask is None:
            return ALiBi(self.slopes)
        return ALiBi(self.slopes, (mask.long().cumsum(-1) - 1) * mask.long())


class RelativeBias(nn.Module):
    """T5's learned bias for `position_bias`, one for all layers of a stack; weight [buckets, heads]
    starts at 0. Source: Raffel et al., arXiv 1910.10683."""

    def __init__(
        self,
        heads: int,
        buckets: int = 32,
        max_distance: int = 128,
        *,
        bidirectional: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(buckets, heads, device=device, dtype=dtype))
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def forward(self) -> RelativePositionBias:
        return RelativePositionBias(
            self.weight, bidirectional=self.bidirectional, max_distance=self.max_distance
        )


class Rotary(nn.Module):
    """The angles of rotary embedding for `rotary`: forward(count, offset=0) gives (cos, sin), each
    float32 [count, width], of positions offset .. offset + count - 1, an angle a pair repeated for
    both halves; for packed sequences forward(positions=...) of an integer tensor [total].

    Source: Su et al., arXiv 2104.09864.
    """

    def __init__(self, width: int, base: float = 10000.0, device=None):
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width must be even and at least 2, got {width}")
        pairs = torch.arange(0, width, 2, dtype=torch.float32, device=device)
        self.register_buffer("frequencies", base ** (-pairs / width), persistent=False)

    def forward(
        self, count: int = 0, offset: int = 0, *, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if positions is None:
            positions = torch.arange(offset, offset + count, device=self.frequencies.device)
        angles = positions[..., None] * self.frequencies.float()
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()
