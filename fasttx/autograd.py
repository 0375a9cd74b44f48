"""Autograd around an op: the first derivative by its kernels, higher ones by the reference.

Two Functions an op and direction: the classic form, and the setup_context form used only under
torch.func transforms, which costs three times as much. With grad mode on, the backward is a
Function of its own, whose backward differentiates the reference: a gradient penalty or a grad of
grad is right, to any order, not silently dropped. What every training call runs is as short as it
can be: on a tiny tensor a line of Python costs as much as a kernel.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.compiler import is_compiling


@functools.cache
def _needed(inputs: tuple[bool, ...]) -> tuple[int, Callable]:
    """From needs_input_grad of (given, *tensors): the tensors' bits, and what takes the gradients
    of those inputs from the tensors' gradients and a None behind them."""
    bits = sum(1 << i for i, needed in enumerate(inputs[1:]) if needed)
    return bits, itemgetter(-1, *(i if needed else -1 for i, needed in enumerate(inputs[1:])))


@dataclass(frozen=True)
class Direct:
    """What `differentiable` needs to go from one native op to another without Python between.

    forward: the op of (*tensors, *rest, *scalars). slots: the arguments of its backward's op, "t0"
    a tensor, "r0" one of the rest, "o0" an output, "u0" an upstream gradient, "s0" a scalar, "n"
    what is needed; that op gives one gradient a tensor. kept: the outputs that slots name.
    """

    forward: object
    slots: str

    @property
    def kept(self) -> list[int]:
        return [int(slot[1:]) for slot in self.slots.split() if slot[0] == "o"]

    @functools.cached_property
    def functions(self) -> tuple[Callable, Callable, Callable]:
        """forward(ctx, given, tensors) and backward(ctx, upstream, saved), in C++, which return
        NotImplemented where the long way must be taken, and alike(tensors, dims)."""
        from . import _C

        return _C.direct_function(self.forward, self.forward.backward, self.slots, self.kept)

    def alike(self, tensors: tuple, dims: tuple[int, ...]) -> bool:
        """Whether the tensors are known to fit together: floating but not float64, on the CPU, and
        each after the first is None or has the first's last size and this many dimensions, or for 0
        the first's shape. A door need not check then; False says nothing."""
        known = not is_compiling() and self.forward.direct
        return bool(known) and self.functions[2](tensors, dims)


def differentiable(
    name: str,
    forward: Callable,
    backward: Callable,
    math: Callable,
    save: Callable | None = None,
    direct: Direct | None = None,
) -> Callable:
    """`call(tensors, rest, scalars, backend, constant=())`, differentiable in `tensors` (None where
    an argument is absent).

    forward(tensors, rest, scalars, backend) gives the outputs, a tuple. backward(upstream, tensors,
    rest, outputs, scalars, need, backend) gives one gradient for each tensor whose bit in `need` is
    set and anything for the others; an upstream gradient is None where an output was not used.
    math(tensors, rest, scalars) is the forward in plain PyTorch, with the same outputs.
    save(tensors, outputs) may replace what the backward does not read by None; a second derivative
    through a tensor that was dropped is refused. direct: the same forward, backward and save as
    data, for native ops. rest: tensors without gradients; scalars: anything
    else. constant: outputs, by index, that carry no gradient.
    """
    save = save or (lambda tensors, outputs: (tensors, outputs))
    op = direct and direct.forward
    own_call = type(op).__call__  # a test may watch the calls of ops

    def keep(ctx, given, tensors, outputs):
        kept, kept_outputs = save(tensors, outputs)
        ctx.save_for_backward(*kept, *given[0], *kept_outputs)
        ctx.given = given
        ctx.set_materialize_grads(False)
        if given[3]:
            ctx.mark_non_differentiable(*[outputs[i] for i in given[3]])

    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given, *tensors):
            # An op that has learnt a direct call is native.
            if (
                op is not None
                and not is_compiling()
                and op.direct
                and type(op).__call__ is own_call
            ):
                outputs = direct.functions[0](ctx, given, tensors)
                if outputs is not NotImplemented:
                    return outputs
            rest, scalars, backend, _ = given
            outputs = forward(tensors, rest, scalars, backend)
            keep(ctx, given, tensors, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *upstream):
            if is_compiling() or torch.is_grad_enabled():
                return differentiable_backward(ctx, upstream)
            saved = ctx.saved_tensors
            if op is not None and op.backward.direct and type(op).__call__ is own_call:
                grads = direct.functions[1](ctx, upstream, saved)
                if grads is not NotImplemented:
                    return grads
            rest, scalars, backend, _ = ctx.given
            need, place = _needed(ctx.needs_input_grad)
            n = len(ctx.needs_input_grad) - 1
            m = n + len(rest)
            grads = backward(upstream, saved[:n], saved[n:m], saved[m:], scalars, need, backend)
            return place((*grads, None))

    def differentiable_backward(ctx, upstream):
        rest, scalars, backend, constant = ctx.given
        # Compiled code hands over zeros for a constant output, where eager gives None.
        upstream = tuple(None if i in constant else g for i, g in enumerate(upstream))
        n = len(ctx.needs_input_grad) - 1
        saved, m = ctx.saved_tensors, n + len(rest)
        tensors, rest, outputs = saved[:n], saved[n:m], saved[m:]
        need = sum(1 << i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed)
        if is_compiling() or not torch.is_grad_enabled():
            grads = backward(upstream, tensors, rest, outputs, scalars, need, backend)
        else:
            twice = SecondTransformed if torch._C._are_functorch_transforms_active() else Second
            grads = twice.apply(
                len(upstream), n, rest, outputs, scalars, need, backend, *upstream, *tensors
            )
        return None, *(g if need >> i & 1 else None for i, g in enumerate(grads))

    # Function.apply without what it does for transforms, which call() has ruled out.
    apply_first = super(torch.autograd.Function, First).apply

    class FirstTransformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(given, *tensors):
            return forward(tensors, *given[:3])

        @staticmethod
        def setup_context(ctx, inputs, output):
            given, *tensors = inputs
            keep(ctx, given, tensors, output)

        @staticmethod
        def backward(ctx, *upstream):
            return differentiable_backward(ctx, upstream)

    def run_second(count, n, rest, outputs, scalars, need, backend, *upstream_and_tensors):
        upstream, tensors = upstream_and_tensors[:count], upstream_and_tensors[count:]
        grads = list(backward(upstream, tensors, rest, outputs, scalars, need, backend))
        for i, g in enumerate(grads):  # an output of a Function has one place
            if g is not None and any(g is other for other in grads[:i]):
                grads[i] = g.clone()
        return tuple(grads)

    def keep_second(ctx, inputs):
        ctx.count, ctx.n, rest, _, ctx.scalars, ctx.need, _, *upstream_and_tensors = inputs
        ctx.save_for_backward(*upstream_and_tensors, *rest)

    class Second(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            keep_second(ctx, inputs)
            return run_second(*inputs)

        @staticmethod
        def backward(ctx, *given):
            count, n = ctx.count, ctx.n
            saved = ctx.saved_tensors
            saved, rest = saved[: count + n], saved[count + n :]
            wanted = [count + i for i in range(n) if ctx.need >> i & 1]
            if any(saved[i] is None for i in wanted):
                raise NotImplementedError(
                    f"fasttx.{name} has no second derivative: its backward keeps no input"
                )
            present = [i for i, t in enumerate(saved) if t is not None and t.is_floating_point()]
            leaves = [i for i in present if i >= count]
            used = [i for i in range(count) if saved[i] is not None]

            def gradients(*values):
                at = dict(zip(present, values, strict=True))

                def plain(*values):
                    inner = {**at, **dict(zip(leaves, values, strict=True))}
                    outputs = math(
                        tuple(inner.get(i, saved[i]) for i in range(count, count + n)),
                        rest,
                        ctx.scalars,
                    )
                    return tuple(outputs[i] for i in used)

                outputs, pull = torch.func.vjp(plain, *(at[i] for i in leaves))
                first = pull(tuple(at[i].to(o.dtype) for i, o in zip(used, outputs, strict=True)))
                return tuple(first[leaves.index(i)] for i in wanted)

            _, pull = torch.func.vjp(gradients, *(saved[i] for i in present))
            second = dict(zip(present, pull(tuple(given[i - count] for i in wanted)), strict=True))
            return *(None,) * 7, *(
                second.get(i) if needed else None
                for i, needed in enumerate(ctx.needs_input_grad[7:])
            )

    class SecondTransformed(torch.autograd.Function):
        generate_vmap_rule = True
        backward = Second.backward

        @staticmethod
        def forward(*inputs):
            return run_second(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            keep_second(ctx, inputs)

    def call(
        tensors: tuple,
        rest: tuple,
        scalars: tuple,
        backend: str | None,
        constant: tuple[int, ...] = (),
    ) -> tuple[Tensor, ...]:
        if torch._C._are_functorch_transforms_active():
            return FirstTransformed.apply((rest, scalars, backend, constant), *tensors)
        if torch.is_grad_enabled():
            for t in tensors:
                if t is not None and t.requires_grad:
                    given = rest, scalars, backend, constant
                    if is_compiling():
                        return First.apply(given, *tensors)
                    return apply_first(
                        given, *[t if t is None else unwrap_if_dead(t) for t in tensors]
                    )
        return forward(tensors, rest, scalars, backend)

    return call
