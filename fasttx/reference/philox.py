"""The dropout bits of every backend: Philox4x32-10 as a pure function of seed and position.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

_MUL = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def dropout_threshold(p: float) -> int:
    """16-bit lanes below this are dropped: round(p * 65536), at most 65535."""
    return min(65535, int(p * 65536 + 0.5))


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (in int64) for each counter (four broadcastable int64 tensors of 32-bit
    words) under a 64-bit key."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # A 64-bit product of two 32-bit words wraps to the right bits in int64; the masks undo the
        # sign of the shift.
        a, b = c0 * _MUL[0], c2 * _MUL[1]
        c0, c1, c2, c3 = (
            ((b >> 32) & _LOW) ^ c1 ^ k0,
            b & _LOW,
            ((a >> 32) & _LOW) ^ c3 ^ k1,
            a & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def philox_mask(
    seed: Tensor, p: float, batch: int, heads: int, rows: int, columns: int, first_batch: int = 0
) -> Tensor:
    """bool [batch, heads, rows, columns], True where kept with probability 1 - round(p * 65536) /
    65536.

    Counter (column // 8, row, head, batch); column c takes word (c % 8) // 2, its low half for even
    c.
    """

    def index(n: int, dim: int, start: int = 0) -> Tensor:
        shape = [-1 if d == dim else 1 for d in range(4)]
        return torch.arange(start, start + n, device=seed.device).view(shape)

    at = index((columns + 7) // 8, 3), index(rows, 2), index(heads, 1), index(batch, 0, first_batch)
    words = philox(at, int(seed.item()))
    lanes = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], -1)
    return lanes.flatten(-2)[..., :columns] >= dropout_threshold(p)
