"""Whether a module may be computed around: fusing reads its parameters and never calls it."""

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """module is of exactly one of classes (so no adapter, quantized or parametrized form of it),
    carries no hooks and no forward of its own."""
    return (
        type(module) in classes
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and "forward" not in vars(module)
    )
