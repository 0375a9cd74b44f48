"""ids ~ softmax(logits / temperature), the most probable alone where top_k and top_p say so.

Below the door: logits [R, V] of any strides; ids int64 [R]. Everything after one rounding is
integer arithmetic, so that the same seed gives the same ids on every backend and instruction set.
With m the largest logit of a row, in float32 (float64 for float64 logits)

    d = min((m - x) * factor, 40 * 2^24), cut to an integer (0 where x = m), factor = 2^24 log2(e)
    / temperature
    w = (h << 7) >> (d >> 24),  h = 2^31 * 2^-y by a polynomial in y = (d mod 2^24) / 2^24 (_mass
    in fasttx/reference/sample.py): a weight of at most 2^38, relative error 8e-8, 0 where a logit
    is more than 38 powers of two less probable than the first

top_k (0: all) keeps the logits x >= t where t is the k-th largest; then top_p (1: all) those x >= t
where t is the largest logit such that the kept ones weigh at least P = p * (their sum before). Of
the kept weights w_i with sum W, the id is the first whose running sum passes r = u * W, u in [0, 1)
the leading 53 bits of words 0 and 1 of Philox4x32-10 with counter (0, row, 0, 0) under seed int64
[1]. greedy: the first of the largest logits, no seed. A row that holds NaN, or nothing but -inf,
gives -1. +inf shares the whole probability.
"""

import math
import os

import torch
from torch import Tensor

from ..op import Kernel, Needs, Op
from ._checks import check_backend, check_float, has_values, number, seed_tensor

__all__ = ["sample", "sample_fwd"]
MOST_CLASSES = 2**24


@Op
def sample_fwd(
    logits: Tensor, seed: Tensor | None, factor: float, top_k: int, top_p: float, greedy: bool
) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


_triton = "fasttx.kernels.sample:sample_fwd"
_reference = Kernel(
    "reference", "fasttx.reference.sample:sample_fwd", Needs(dtypes=None, dtype_of="logits")
)
sample_fwd.kernels(
    cpu=[
        Kernel("cpu", "native:sample_fwd_cpu", Needs(dtype_of="logits")),
        Kernel(
            "triton",
            _triton,
            Needs(dtype_of="logits", env=("TRITON_INTERPRET", "1"), by_name=True),
        ),
        # What is drawn is fasttx's own: PyTorch has the largest logit alone.
        Kernel(
            "torch",
            "fasttx.reference.torch_own:sample_fwd",
            Needs(dtype_of="logits", absent=("seed",), by_name=True),
        ),
        _reference,
    ],
    cuda=[Kernel("triton", _triton, Needs(dtype_of="logits", sm=80)), _reference],
)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token id a row, drawn from softmax(logits / temperature) after top-k and top-p.

    The filters are those of transformers, in their order: temperature, then top_k keeps the k
    largest logits, then top_p the fewest of these, most probable first, whose probabilities reach
    top_p. Equal logits stand or fall together: a tie at the edge of either filter is kept whole.

    Args:
        logits: [..., V], 1 <= V <= 2^24, float32, bfloat16, float16 (float64 by the reference), any
            strides. No gradient.
        temperature: finite, at least 0. 0 is greedy: the first of the largest logits, whatever the
            filters.
        top_k: an int of at least 1; None, or V and more, keeps all.
        top_p: in [0, 1]; None and 1 keep all, 0 the largest logit alone. Rounded to float32.
        generator: a torch.Generator on the logits' device from which the seed is drawn; None is
            torch's own.
        seed: instead of a generator the key itself, an int or an int64 tensor of one element. The
            ids are a pure function of it, the logits and the row's number: the same on every
            backend.
        backend: None chooses; "cpu", "triton", "torch" (PyTorch's argmax on the CPU, for
            temperature 0) or "reference" runs that or raises with every kernel's reason.

    Returns:
        int64 [...]. -inf is never drawn; rows with +inf draw among these. Logits more than 26 below
        the largest (times temperature) count as -inf.

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything runs; on
            the CPU also for a row that holds NaN or nothing but -inf. Elsewhere logits are not read
            by the host and such a row gives -1 (FASTTX_CHECK=1 raises, with a sync).
        NotImplementedError: no kernel supports the call, with each kernel's reason.

    Sources: Fan et al., arXiv 1805.04833 (top-k); Holtzman et al., 1904.09751 (top-p).
    """
    check_backend(backend)
    check_float("logits", logits)
    if logits.dim() == 0 or not 1 <= logits.shape[-1] <= MOST_CLASSES:
        raise ValueError(
            f"logits must be [..., V] with 1 <= V <= {MOST_CLASSES}, got shape "
            f"{tuple(logits.shape)}"
        )
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
        raise number("temperature", temperature, "a finite number of at least 0")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise number("top_k", top_k, "None or an int of at least 1")
    if top_p is not None and (not isinstance(top_p, (int, float)) or not 0 <= top_p <= 1):
        raise number("top_p", top_p, "None or in [0, 1]")
    key, greedy = None, temperature == 0
    if generator is not None:
        _check_generator(generator, seed, logits.device)
    if not greedy:
        if generator is not None:
            seed = torch.randint(
                -(2**63), 2**63 - 1, (1,), generator=generator, device=logits.device
            )
        key = seed_tensor(seed, logits.device, "logits")
    shape, V = logits.shape[:-1], logits.shape[-1]
    rows = logits.detach()
    if len(shape) != 1:
        rows = rows.flatten(0, -2) if shape else rows[None]
    ids = sample_fwd(
        rows,
        key,
        0.0 if greedy else min(2**24 * math.log2(math.e) / temperature, 1e38),
        0 if top_k is None or top_k >= V else top_k,
        1.0 if top_p is None else float(top_p),
        greedy,
        backend=backend,
    )
    if has_values(ids) or (ids.is_cuda and os.environ.get("FASTTX_CHECK", "0") == "1"):
        _check_drawn(ids)
    return ids if len(shape) == 1 else ids.reshape(shape)


def _check_generator(generator, seed, device: torch.device) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be None or a torch.Generator, got {type(generator).__name__}"
        )
    if seed is not None:
        raise ValueError("generator must be None where seed is given, got both")
    if generator.device.type != device.type:
        raise ValueError(
            f"generator must be on the logits' device {device}, got {generator.device}"
        )


def _check_drawn(ids: Tensor) -> None:
    if ids.numel() and int(ids.min()) < 0:
        row = int((ids < 0).nonzero()[0])
        raise ValueError(
            "logits must have a number above -inf and no NaN in every row, got neither in row "
            f"{row}"
        )
