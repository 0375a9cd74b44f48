"""Each attention a model computes, as it computes it: a dispatch mode sees every call of the op
attention_fwd with its arguments and its lse, whoever made it (fasttx.nn, a patched model), and
hooks on every module say which module that was. Nothing is computed twice, and nothing is kept."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ..layers import CrossAttention
from ..ops.attention import attention_fwd

__all__ = ["Capture", "capture"]

_FORWARD = attention_fwd.overload
_NAMES = [a.name for a in _FORWARD._schema.arguments]
# What CrossAttention's parts are called in transformers' BART and T5, and in models like them.
_CROSS = {"cross", "crossattention", "encoder_attn", "encdecattention"}


@dataclass
class Capture:
    """One call of attention: the module's name, "encoder", "decoder" or "cross", the arguments of
    attention_fwd by name, and lse [B,H,S]."""

    name: str
    kind: str
    args: dict
    lse: Tensor


@contextlib.contextmanager
def capture(model: nn.Module, see: Callable[[Capture], None]) -> Iterator[None]:
    """Within the context `see` is called with every attention that model computes, in its order."""
    modules = {id(m): (name, m) for name, m in model.named_modules()}
    running: list[str] = []

    def enter(module, args):
        if id(module) in modules:
            running.append(modules[id(module)][0])

    def leave(module, args, result):
        if id(module) in modules:
            running.pop()

    def called(args: dict, lse: Tensor) -> None:
        name = running[-1] if running else ""
        module = model.get_submodule(name)
        see(
            Capture(name, _kind(name, module, args["lower_right"] or args["right"] == 0), args, lse)
        )

    # Hooks of all modules and not of these: a module with hooks of its own is run another way.
    before = module_hooks.register_module_forward_pre_hook(enter)
    after = module_hooks.register_module_forward_hook(leave, always_call=True)
    try:
        with _Mode(called):
            yield
    finally:
        before.remove()
        after.remove()


class _Mode(TorchDispatchMode):
    def __init__(self, called: Callable):
        super().__init__()
        self.called = called

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is _FORWARD:
            self.called(dict(zip(_NAMES, args, strict=False)), result[1])
        return result


def _kind(name: str, module: nn.Module, causal: bool) -> str:
    parts = name.lower().split(".")
    if isinstance(module, CrossAttention) or _CROSS & set(parts):
        return "cross"
    if "encoder" in parts:
        return "encoder"
    return "decoder" if "decoder" in parts or causal else "encoder"
