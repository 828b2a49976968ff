"""Operators ``torch.ops.fsa_rs.*``, and the short way around them.

What traces, transforms or overrides calls (``torch.compile``, ``torch.func``, modes, subclasses of tensors) has to
see operators. A plain call needs none of that, and the way of a Python operator through the dispatcher takes the host
longer than the call itself: it goes to the kernel directly, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from types import new_class
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

Parameter = torch.nn.Parameter
#: What ``torch.no_grad`` calls, which takes ten times as long.
_set_grad_enabled = torch._C._set_grad_enabled


def _observed() -> bool:
    """Whether something may look at the operators that are called."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    """Neither kernels nor custom operators see the tangent of a dual tensor: it would be lost without a word."""
    if forward_ad._current_level < 0:
        return
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):  # type: ignore[no-untyped-call]
        raise NotImplementedError(f"{name}: expected tensors without tangents, got a dual tensor")


def _refuse_transforms(name: str, arguments: tuple[Any, ...]) -> None:
    """The gradient of a custom operator is none that ``torch.func.grad`` and its like can take."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    functorch = torch._C._functorch
    for x in arguments:
        while isinstance(x, Tensor) and functorch.is_functorch_wrapped_tensor(x):
            if functorch.is_gradtrackingtensor(x):
                transforms = "grad, vjp, jacrev and hessian of torch.func are not supported"
                raise NotImplementedError(f"{name}: {transforms}: use torch.autograd.grad or backward")
            x = functorch.get_unwrapped(x)


class _Route(NamedTuple):
    """A kernel, and what makes a node of autograd of a call whose output is there, if it has a gradient."""

    kernel: Callable[..., Any]
    apply: Callable[..., Any] | None


class Operator:
    """An operator with a kernel for the CPU and one for CUDA, which take all arguments in order.

    ``save`` and ``differentiate`` are ``setup_context`` and ``backward`` of ``torch.library.register_autograd``.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        kernels: tuple[Callable[..., Any], Callable[..., Any]],
        fake: Callable[..., Any],
        save: Callable[..., None] | None = None,
        differentiate: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        self.name = name
        registered = torch.library.custom_op(f"fsa_rs::{name}", kernels[0], mutates_args=(), schema=schema)
        registered.register_kernel("cuda")(kernels[1])
        registered.register_fake(fake)
        if save is None or differentiate is None:
            self.on_cpu, self.on_cuda = (_Route(kernel, None) for kernel in kernels)
        else:
            registered.register_autograd(differentiate, setup_context=save)
            apply = _node(name, save, differentiate)
            self.on_cpu, self.on_cuda = (_Route(kernel, apply) for kernel in kernels)
        self.operator = getattr(torch.ops.fsa_rs, name).default

    def __call__(self, *arguments: Any) -> Any:
        if _observed():
            _refuse_tangents(self.name, arguments)
            _refuse_transforms(self.name, arguments)
            return self.operator(*arguments)
        # The device waits for all of this: nothing is asked that need not be.
        route, records, differentiates = self.on_cpu, torch.is_grad_enabled(), False
        for x in arguments:
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                if x.is_cuda:
                    route = self.on_cuda
                elif not x.is_cpu:
                    return self.operator(*arguments)
                if x.is_neg():  # negated when it is read
                    return self.operator(*arguments)
                if records and x.requires_grad:
                    differentiates = True
            elif isinstance(x, Tensor):
                return self.operator(*arguments)
        if not differentiates:
            return route.kernel(*arguments)
        if route.apply is None:
            return self.operator(*arguments)  # that of a backward, which refuses to be differentiated
        _set_grad_enabled(False)
        try:
            output = route.kernel(*arguments)
        finally:
            _set_grad_enabled(True)
        return route.apply(*arguments, output)


def _node(name: str, save: Callable[..., None], differentiate: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """What makes the node of autograd of a call whose output, its last argument, is there: the device is at work."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = arguments[-1]
        save(ctx, arguments[:-1], output)
        return output

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (*differentiate(ctx, *grads), None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = new_class(f"fsa_rs_{name}", (torch.autograd.Function,), exec_body=lambda body: body.update(methods))
    # That of the class asks what was asked before: whether a transform is active.
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply
