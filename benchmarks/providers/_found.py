"""Whether a provider's package and the device it needs are here."""

import importlib.util

import torch


def missing(package: str, cuda: bool = False) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if cuda and not torch.cuda.is_available():
        return f"{package} runs on CUDA devices, and torch sees none here"
    return None
