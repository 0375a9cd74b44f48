"""From the op's inner arguments to what every attention kernel of one call shares."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import Call, Features, dot_precision, make_features, specialize
from .tiles import Tile, pick_tile

LOG2E = 1.4426950408889634
L2_SECTION_BYTES = 32 << 20


@triton.jit
def expand_table_kernel(
    diagonals, table, lut, table_stride, heads, count, unit, F: tl.constexpr
):  # fmt: skip
    """diagonals[h, t] = unit * table[lut[t], h], fp32: the bias of each distance."""
    blocks = tl.cdiv(count, F.BLOCK_N)
    program = tl.program_id(0)
    head = program // blocks
    t = (program % blocks) * F.BLOCK_N + tl.arange(0, F.BLOCK_N)
    bucket = tl.load(lut + t, mask=t < count, other=0)
    value = tl.load(
        table + bucket.to(tl.int64) * table_stride[0] + head * table_stride[1],
        mask=t < count,
        other=0.0,
    )
    tl.store(diagonals + head.to(tl.int64) * count + t, value.to(tl.float32) * unit, mask=t < count)


def _broadcast_strides(x: torch.Tensor, rank: int) -> tuple:
    """Strides with 0 along dimensions of size 1, so that any index reads the one element."""
    return tuple(x.stride(d) if x.size(d) > 1 else 0 for d in range(rank))


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass
class Plan:
    """One call of attention, forward or backward, with its flags and scalars worked out."""

    arch: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    features: Features
    pointers: tuple  # mask, slopes, positions, diagonals, cu_q, cu_k, seed
    strides: tuple  # q, k, v, mask, slopes, positions
    sequences: int
    scalars: tuple  # scale, cap, threshold, keep_scale, left, right, bias_shift, reach
    calls: list

    @classmethod
    def make(cls, arch, q, k, v, mask, slopes, positions, table, lut, cu_q, cu_k, seed,
             scale, softcap, dropout_p, left, right, lower_right, bias_shift,
             others=()):  # fmt: skip
        S, D = q.shape[2:]
        T, DV = v.shape[2:]
        packed = cu_q is not None
        natural = q.dtype == torch.float32 or (mask is not None and mask.dtype != torch.bool)
        unit = 1.0 if natural else LOG2E
        threshold = min(65535, int(dropout_p * 65536 + 0.5))
        calls, diagonals, reach = [], None, 0
        bias, mask_kind, axes = "none", "none", "ij"
        mask_stride = slope_stride = position_stride = (0, 0, 0, 0)
        if mask is not None:
            mask_kind = "bool" if mask.dtype == torch.bool else "float"
            axes = "j" if mask.size(2) == 1 else "i" if mask.size(3) == 1 else "ij"
            mask_stride = _broadcast_strides(mask, 4)
            if mask_kind == "bool":
                mask = mask.view(torch.uint8)
        if slopes is not None:
            bias = "alibi" if positions is None else "alibi_positions"
            slope_stride = _broadcast_strides(slopes, 2)
        if positions is not None:
            position_stride = (_broadcast_strides(positions, 2)[0], positions.stride(1))
        strides = [x.stride() for x in (q, k, v, *others) if x.dim() == 4]
        wide = max(max(s[2], s[3]) for s in strides) * 256 >= 2**31
        features = make_features(
            D=D,
            DV=DV,
            BLOCK_M=16,
            BLOCK_N=16,
            BLOCK_D=max(16, _next_power_of_2(D)),
            BLOCK_DV=max(16, _next_power_of_2(DV)),
            PRECISION=dot_precision() if q.dtype == torch.float32 else "ieee",
            FP32=q.dtype == torch.float32,
            HAS_LEFT=left >= 0,
            HAS_RIGHT=right >= 0,
            LOWER_RIGHT=bool(lower_right) and (left >= 0 or right >= 0),
            PACKED=packed,
            MASK=mask_kind,
            MASK_AXES=axes,
            BIAS="table" if table is not None else bias,
            SOFTCAP=softcap > 0,
            DROPOUT=threshold > 0,
            NATURAL=natural,
            POSITIVE_SCALE=scale >= 0,
            WIDE=wide,
        )
        if table is not None:
            heads, count = q.size(1), lut.numel()
            reach = count // 2
            diagonals = torch.empty(heads, count, dtype=torch.float32, device=q.device)
            block = 256
            calls.append(
                Call(
                    expand_table_kernel,
                    (heads * -(-count // block),),
                    (diagonals, table, lut.contiguous(), table.stride(), heads, count, unit),
                    specialize(features, BLOCK_N=block),
                    4,
                    1,
                )
            )
        scalars = (
            scale / softcap if softcap > 0 else scale * unit,
            softcap * unit,
            threshold,
            65536 / (65536 - threshold),
            left if 0 <= left < S + T else S + T,
            right if 0 <= right < S + T else S + T,
            bias_shift,
            reach,
        )
        return cls(
            arch,
            q,
            k,
            v,
            features,
            (mask, slopes, positions, diagonals, cu_q, cu_k, seed if threshold else None),
            (q.stride(), k.stride(), v.stride(), mask_stride, slope_stride, position_stride),
            cu_q.numel() - 1 if packed else 0,
            scalars,
            calls,
        )

    @property
    def heads(self) -> int:
        return self.q.size(1)

    @property
    def group(self) -> int:
        return self.heads // max(1, self.k.size(1))

    def tile(self, kernel: str) -> Tile:
        f = self.features
        wanted = {
            "band": f.HAS_LEFT or f.HAS_RIGHT,
            "mask": f.MASK != "none",
            "pairs": f.MASK != "none" and f.MASK_AXES == "ij",
            "alibi": f.BIAS in ("alibi", "alibi_positions"),
            "table": f.BIAS == "table",
            "softcap": f.SOFTCAP,
            "dropout": f.DROPOUT,
        }
        return pick_tile(
            kernel,
            self.arch,
            self.q.element_size(),
            max(f.BLOCK_D, f.BLOCK_DV),
            self.q.size(2),
            self.k.size(2),
            frozenset(name for name, on in wanted.items() if on),
        )

    def shared_args(self) -> tuple:
        """The arguments that end every kernel's list, before F."""
        q = self.q
        return (
            *(q, self.k, self.v, *self.pointers),
            *self.strides,
            *(self.heads, self.group, q.size(2), self.k.size(2), self.sequences),
            *self.scalars,
        )

    def tiles(self, length: int, block: int) -> int:
        """Tiles along one axis; for packed sequences a bound that needs no lengths."""
        if self.features.PACKED:
            return length // block + self.sequences + 1
        return -(-length // block)

    def section(self, pairs: int) -> int:
        """Batch-head pairs whose keys and values share the L2 cache; 1 without a causal band."""
        f = self.features
        if f.PACKED or f.HAS_LEFT or not f.HAS_RIGHT:
            return 1
        size = self.k.size(2) * (f.D + f.DV) * self.k.element_size()
        heads = max(1, L2_SECTION_BYTES // max(1, size)) * self.group
        return min(heads, pairs)
