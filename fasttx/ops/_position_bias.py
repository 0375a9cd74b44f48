"""Position biases of attention: ALiBi's slopes and T5's learned relative buckets. Plain data;
kernels apply them."""

import functools
import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class ALiBi:
    """Attention with linear biases: bias[b, h, i, j] = slopes[h or b, h] * position(b, j).

    slopes: floating [H] or [B, H] ([sequences, H] when packed), without a gradient. positions: the
    key positions [T] or [B, T], the key index where None; Hugging Face's BLOOM gives cumulative
    sums of the padding mask. Within a row the softmax cannot tell slope * j from slope * (j - i).
    Source: Press et al., arXiv 2108.12409.
    """

    def __init__(self, slopes: Tensor, positions: Tensor | None = None):
        if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
            raise TypeError(
                f"slopes must be a floating tensor [H] or [B, H], got {_describe(slopes)}"
            )
        if slopes.dim() not in (1, 2):
            raise ValueError(f"slopes must be [H] or [B, H], got shape {tuple(slopes.shape)}")
        if slopes.requires_grad:
            raise ValueError(
                "slopes requires grad, but ALiBi has no gradient for its slopes: pass "
                "slopes.detach()"
            )
        if positions is not None:
            if (
                not isinstance(positions, Tensor)
                or positions.dtype in (torch.bool,)
                or positions.is_complex()
            ):
                raise TypeError(
                    f"positions must be an integer or floating tensor [T] or [B, T], got "
                    f"{_describe(positions)}"
                )
            if positions.dim() not in (1, 2):
                raise ValueError(
                    f"positions must be [T] or [B, T], got shape {tuple(positions.shape)}"
                )
        self.slopes, self.positions = slopes, positions

    @staticmethod
    def standard_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
        """The paper's geometric slopes; for a head count that is no power of two, interleaved as in
        BLOOM."""
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        near = 2 ** math.floor(math.log2(heads))
        slopes = [2.0 ** (-8.0 * (i + 1) / near) for i in range(near)]
        slopes += [2.0 ** (-4.0 * (2 * i + 1) / near) for i in range(heads - near)]
        return torch.tensor(slopes, dtype=torch.float32, device=device)

    def __repr__(self) -> str:
        return f"ALiBi(slopes {tuple(self.slopes.shape)}, positions={_describe(self.positions)})"


class RelativePositionBias:
    """T5's learned bias: bias[h, i, j] = weight[bucket(j - i - query_offset), h].

    weight [buckets, H] gets its exact gradient. The first half of a direction's buckets are exact
    distances, the rest grow logarithmically to max_distance; bidirectional spends half of the
    buckets on j > i. query_offset: the position of query 0 relative to key 0; None means T - S, the
    rule of cached decoding. The bias is computed inside the kernel, no S x T tensor exists. Source:
    Raffel et al., arXiv 1910.10683; the buckets are those of transformers' T5, bit for bit.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        bidirectional: bool = True,
        max_distance: int = 128,
        query_offset: int | None = None,
    ):
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(
                f"weight must be a floating tensor [buckets, H], got {_describe(weight)}"
            )
        if weight.dim() != 2:
            raise ValueError(f"weight must be [buckets, H], got shape {tuple(weight.shape)}")
        least = 4 if bidirectional else 2
        if weight.shape[0] < least or (bidirectional and weight.shape[0] % 2):
            raise ValueError(
                f"weight must have {'an even number of ' if bidirectional else ''}at least "
                f"{least} buckets, got {weight.shape[0]}"
            )
        exact = weight.shape[0] // least
        if not isinstance(max_distance, int) or max_distance <= exact:
            raise ValueError(
                f"max_distance must be an int above {exact}, the number of exact distances, "
                f"got {max_distance!r}"
            )
        if query_offset is not None and not isinstance(query_offset, int):
            raise TypeError(f"query_offset must be an int or None, got {query_offset!r}")
        self.weight, self.bidirectional = weight, bool(bidirectional)
        self.max_distance, self.query_offset = max_distance, query_offset

    def buckets(self) -> Tensor:
        """int32 [2 * max_distance + 1]: the bucket of d = j - i at clamp(d) + max_distance."""
        return _bucket_lut(self.weight, self.bidirectional, self.max_distance)

    def __repr__(self) -> str:
        return (
            f"RelativePositionBias({_describe(self.weight)}, bidirectional={self.bidirectional}, "
            f"max_distance={self.max_distance})"
        )


_luts: dict[tuple, Tensor] = {}


def _bucket_lut(weight: Tensor, bidirectional: bool, max_distance: int) -> Tensor:
    count = weight.shape[0]
    if torch.compiler.is_compiling():
        count = len(
            range(count)
        )  # a plain int even of a dynamic shape: the buckets are a constant of the graph
    plain = not torch.compiler.is_compiling() and type(weight) in (Tensor, torch.nn.Parameter)
    key = (count, bidirectional, max_distance, weight.device)
    if plain and key in _luts:
        return _luts[key]
    values = _bucket_values(count, bidirectional, max_distance)
    if plain:  # kept: a tensor of inference mode could not be saved for a backward later
        with torch.inference_mode(False):
            lut = torch.tensor(values, dtype=torch.int32, device=weight.device)
    else:
        lut = torch.tensor(values, dtype=torch.int32, device=weight.device)
    if plain and type(lut) is Tensor:
        _luts[key] = lut
    return lut


def _bucket_values(count: int, bidirectional: bool, max_distance: int) -> tuple[int, ...]:
    return _bucket_rule(count, bidirectional, max_distance)


# What torch.compiler.assume_constant_result sets; calling that would import all of dynamo, and
# Triton with it.
_bucket_values._dynamo_marked_constant = True


@functools.lru_cache(maxsize=64)
def _bucket_rule(count: int, bidirectional: bool, max_distance: int) -> tuple[int, ...]:
    # float32 by eager torch, as transformers' T5 computes it: which bucket an edge falls in depends
    # on the rounding.
    with _disable_current_modes():
        distance = torch.arange(-max_distance, max_distance + 1)
        bucket = torch.zeros_like(distance)
        if bidirectional:
            count //= 2
            bucket += (distance > 0).long() * count
            away = distance.abs()
        else:
            away = -torch.minimum(distance, torch.zeros_like(distance))
        exact = count // 2
        far = exact + (
            torch.log(away.float() / exact) / math.log(max_distance / exact) * (count - exact)
        ).to(torch.int64)
        far = torch.minimum(far, torch.full_like(far, count - 1))
        return tuple((bucket + torch.where(away < exact, away, far)).tolist())


def _describe(value) -> str:
    return (
        f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else repr(value)
    )
