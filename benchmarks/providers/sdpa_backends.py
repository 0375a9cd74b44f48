"""scaled_dot_product_attention held to one of its kernels, where PyTorch's own choice is not the
fastest."""

from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import Skip, sdpa


def _provider(name: str, backend: SDPBackend, cuda: bool) -> SimpleNamespace:
    def reason() -> str | None:
        if cuda and not torch.cuda.is_available():
            return "this kernel runs on CUDA devices, and torch sees none here"
        return None

    def attention(case, x, check: bool):
        call, leaves = sdpa.attention(case, x, check)

        def held():
            with sdpa_kernel(backend):
                return call()

        try:
            held()
        except RuntimeError as error:
            raise Skip(str(error).splitlines()[0]) from error
        return held, leaves

    return SimpleNamespace(
        NAME=f"sdpa_{name}", LABEL=f"PyTorch SDPA, {name}", COMPILES=False, EXTRA=True,
        reason=reason, attention=attention,
    )  # fmt: skip


PROVIDERS = [
    _provider("flash", SDPBackend.FLASH_ATTENTION, False),
    _provider("math", SDPBackend.MATH, False),
    _provider("efficient", SDPBackend.EFFICIENT_ATTENTION, True),
    _provider("cudnn", SDPBackend.CUDNN_ATTENTION, True),
]
