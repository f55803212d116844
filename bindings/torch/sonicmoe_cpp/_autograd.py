"""How the operators take part in autograd: reverse mode once; forward mode is refused.

Registered with the dispatcher, so that all of this also holds for `torch.ops.sonicmoe_cpp.*`.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._library import ops

_LIBRARY = torch.library.Library("sonicmoe_cpp", "IMPL")  # registrations live as long as it does


def refuse_forward_mode(name: str, inputs: tuple) -> None:
    """An operator that ignored a tangent would return one of zeros."""
    if forward_ad._current_level < 0:
        return
    for value in inputs:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"{name}: forward-mode differentiation (jvp) is not supported; use reverse mode"
            )


def no_double_backward(ctx, *grads):
    raise RuntimeError("sonicmoe_cpp: double backward is not supported")


def register_autograd(name: str, backward: Callable, setup_context: Callable | None = None) -> None:
    """As torch.library.register_autograd (which neither refuses forward mode nor works under
    torch.func, and takes 100 microseconds a call to look for default arguments)."""
    operator = getattr(ops, name).default

    def forward(ctx, *inputs):
        functorch = torch._C._are_functorch_transforms_active()
        with _levels_below() if functorch else torch._C._AutoDispatchBelowAutograd():
            output = operator(*inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(f"sonicmoe_cpp_{name}", (torch.autograd.Function,), methods)

    def kernel(*inputs):
        refuse_forward_mode(name, inputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return _apply(function, inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    _LIBRARY.impl(name, kernel, "Autograd")
    torch.library.register_vmap(operator, _vmap_rule(operator))


@contextlib.contextmanager
def _levels_below():
    """torch switches differentiation off inside a Function; levels of torch.func below this one
    have to see to it themselves."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        with torch._C._AutoDispatchBelowAutograd():
            yield


def _apply(function: type[torch.autograd.Function], inputs: tuple):
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    # The dispatcher has already entered one level of torch.func: differentiate at that level.
    from torch._functorch.autograd_function import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*inputs)


def _vmap_rule(operator: Callable) -> Callable:
    """One call for each sample. Slices are copied: rows of a batch of byte buffers are unaligned."""

    def rule(info, in_dims, *inputs):
        def sample(index):
            pairs = zip(inputs, in_dims, strict=True)
            return [v if dim is None else v.select(dim, index).clone() for v, dim in pairs]

        results = [operator(*sample(index)) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


def register_in_place(name: str) -> None:
    """An operator without a gradient that writes into its arguments: autograd learns of the write,
    so that a backward which needs the old value fails, and none of them may require a gradient."""
    operator = getattr(ops, name).default
    arguments = operator._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]

    def autograd_kernel(*inputs):
        refuse_forward_mode(name, inputs)
        if torch.is_grad_enabled():
            for argument, value in zip(arguments, inputs, strict=True):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"{name}: {argument.name}: expected a tensor without requires_grad (or a "
                        "call under torch.no_grad()), got one that requires a gradient"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    def version_kernel(*inputs):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            output = operator(*inputs)
        for index in written:
            if inputs[index] is not None and not inputs[index].is_inference():
                torch.autograd.graph.increment_version(inputs[index])
        return output

    _LIBRARY.impl(name, autograd_kernel, "Autograd")
    _LIBRARY.impl(name, version_kernel, "ADInplaceOrView")
