"""What a kernel is compiled for and how it is launched, as data.

A launcher builds `Call`s. On a GPU or under the interpreter they run; `compile_check` compiles the
same calls, made from meta tensors, for targets that are not there.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

# Integer arguments that kernels are not compiled anew for, whatever their value.
UNSPECIALIZED = [
    "S",
    "T",
    "batch_sum",
    "bias_shift",
    "column_tiles",
    "first_bucket",
    "group",
    "head_sum",
    "heads",
    "kept_heads",
    "left",
    "pairs",
    "reach",
    "right",
    "section",
    "sequences",
    "threshold",
    "tiles",
]


@dataclass(frozen=True)
class Features:
    """Everything an attention kernel is specialized on; passed as one constexpr."""

    D: int  # head size of query and key, and of value
    DV: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    PRECISION: str  # of dots on fp32 operands: "ieee" or "tf32"
    FP32: bool = False  # query, key and value are fp32
    HAS_LEFT: bool = False
    HAS_RIGHT: bool = False
    LOWER_RIGHT: bool = False
    PACKED: bool = False
    EDGE: bool = True  # some block may need its bounds, band or near bias checked
    MASK: str = "none"  # "bool", "float"
    MASK_AXES: str = "ij"  # the axes of the tile along which the mask varies: "ij", "i", "j"
    BIAS: str = "none"  # "alibi", "alibi_positions", "table"
    SOFTCAP: bool = False
    DROPOUT: bool = False
    NATURAL: bool = False  # logits in natural units, else in units of log2
    POSITIVE_SCALE: bool = True
    WIDE: bool = False  # offsets inside a tile can pass 2^31
    WRITE_DQ: bool = False
    WRITE_DK: bool = False
    WRITE_DV: bool = False
    ROW_SUMS: bool = False  # of dS, for the gradient of a mask without a key axis
    COLUMN_SUMS: bool = False  # of dS, for the gradient of a mask without a row axis
    BUCKETS: int = 0  # buckets of the table gradient summed by one launch, a power of two

    @property
    def HIDES(self) -> bool:
        return self.HAS_LEFT or self.HAS_RIGHT or self.MASK != "none"

    # The rare paths that keep NaN and Inf apart work on CAREFUL rows (or keys) by CAREFUL_N keys
    # (CAREFUL_M rows): few, so that they do not set a kernel's register count.
    CAREFUL = 16

    @property
    def CAREFUL_M(self) -> int:
        return min(32, self.BLOCK_M)

    @property
    def CAREFUL_N(self) -> int:
        return min(32, self.BLOCK_N)


# Made once for each kind of call: a launch should cost no more than its arguments.
make_features = functools.lru_cache(maxsize=4096)(Features)
specialize = functools.lru_cache(maxsize=4096)(replace)


@dataclass(frozen=True, slots=True)
class Call:
    kernel: Any
    grid: tuple
    args: tuple
    features: Features
    num_warps: int
    num_stages: int

    def run(self) -> None:
        if self.grid[0] > 0:
            self.kernel[self.grid](
                *self.args,
                F=self.features,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
            )


@functools.cache
def _gpu_arch(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm{major}{minor}"


def device_arch(device: torch.device) -> str:
    """The architecture's name as in the tile tables; "interpreter" for tensors on the CPU."""
    return _gpu_arch(device.index) if device.type == "cuda" else "interpreter"


def dot_precision() -> str:
    """IEEE fp32, unless torch's own switch for CUDA matrix products asks for TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
