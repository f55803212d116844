"""How the operators take part in autograd: reverse mode once; forward mode is refused.

Registered with the dispatcher, so that all of this also holds for `torch.ops.sonicmoe_cpp.*`.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ._library import ops
from ._shared_device import tell_library

_LIBRARY = torch.library.Library("sonicmoe_cpp", "IMPL")  # registrations live as long as it does


def _tensors(inputs: Iterable) -> Iterator[Tensor]:
    """Those of lists as well."""
    for value in inputs:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (v for v in value if isinstance(v, Tensor))


def refuse_forward_mode(name: str, inputs: tuple) -> None:
    """An operator that ignored a tangent would return one of zeros."""
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in _tensors(inputs)):
        raise RuntimeError(
            f"{name}: forward-mode differentiation (jvp) is not supported; use reverse mode"
        )


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """As torch.library.register_autograd (which neither refuses forward mode nor works under
    torch.func, and takes 100 microseconds a call to look for default arguments). For operators
    without lists of tensors."""
    operator = getattr(ops, name).default

    def forward(ctx: Any, *inputs: Any) -> Any:
        with _below_autograd():
            output = operator(*inputs)
        setup_context(ctx, inputs, output)
        return output

    function = _function(name, forward, backward)

    def kernel(*inputs: Any) -> Any:
        refuse_forward_mode(name, inputs)
        tell_library(inputs[0])
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return _apply(function, inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    _LIBRARY.impl(name, kernel, "Autograd")
    torch.library.register_vmap(operator, _vmap_rule(operator))


def register_once_differentiable(name: str) -> None:
    """For backward operators: what they return has no gradient of its own, and asking for one is an
    error. Those that write into arguments tell autograd so, see register_in_place."""
    operator = getattr(ops, name).default
    written = _written(operator)

    def forward(ctx: Any, spec: Any, *leaves: Any) -> Any:
        with _below_autograd():
            return operator(*pytree.tree_unflatten(leaves, spec))

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("sonicmoe_cpp: double backward is not supported")

    function = _function(name, forward, backward)

    def kernel(*inputs: Any) -> Any:
        refuse_forward_mode(name, inputs)
        tell_library(inputs[0])
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(inputs)):
            _refuse_gradients(name, operator, written, inputs)
            leaves, spec = pytree.tree_flatten(inputs)
            return _apply(function, (spec, *leaves))
        # A version kernel of Python costs microseconds: only for a call that writes something.
        writes = any(inputs[place] for place in written)
        below = torch._C._AutoDispatchBelowAutograd if writes else _BELOW_VERSIONS
        with below():
            return operator(*inputs)

    _LIBRARY.impl(name, kernel, "Autograd")
    if written:
        _LIBRARY.impl(name, _version_kernel(operator, written), "ADInplaceOrView")
    torch.library.register_vmap(operator, _vmap_rule(operator))


def called_by_nodes(name: str) -> Callable:
    """A backward operator as the backward of a node calls it: below autograd where that has nothing
    to do, since its kernel of Python takes as long as the operator itself."""
    packet = getattr(ops, name)
    operator = packet.default
    written = _written(operator)

    def call(*inputs: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or forward_ad._current_level >= 0
            or torch._C._are_functorch_transforms_active()
            or any(inputs[place] for place in written)
        ):
            return packet(*inputs)
        tell_library(inputs[0])
        with _BELOW_VERSIONS():
            return operator(*inputs)

    call.__name__ = name
    return call


def register_in_place(name: str) -> None:
    """An operator without a gradient that writes into its arguments: autograd learns of the write,
    so that a backward which needs the old value fails, and none of them may require a gradient."""
    operator = getattr(ops, name).default
    written = _written(operator)

    def kernel(*inputs: Any) -> Any:
        refuse_forward_mode(name, inputs)
        if torch.is_grad_enabled():
            _refuse_gradients(name, operator, range(len(inputs)), inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    _LIBRARY.impl(name, kernel, "Autograd")
    _LIBRARY.impl(name, _version_kernel(operator, written), "ADInplaceOrView")


_BELOW_VERSIONS = torch._C._AutoDispatchBelowADInplaceOrView


def _written(operator: Any) -> list[int]:
    arguments = operator._schema.arguments
    return [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]


def _refuse_gradients(name: str, operator: Any, places: Iterable[int], inputs: tuple) -> None:
    for place in places:
        if any(tensor.requires_grad for tensor in _tensors(inputs[place : place + 1])):
            raise RuntimeError(
                f"{name}: {operator._schema.arguments[place].name}: expected a tensor without "
                "requires_grad (or a call under torch.no_grad()), got one that requires a gradient"
            )


def _version_kernel(operator: Any, written: list[int]) -> Callable:
    def kernel(*inputs: Any) -> Any:
        with _BELOW_VERSIONS():
            output = operator(*inputs)
        for tensor in _tensors([inputs[place] for place in written]):
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        return output

    return kernel


def _function(name: str, forward: Callable, backward: Callable) -> type[torch.autograd.Function]:
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"sonicmoe_cpp_{name}", (torch.autograd.Function,), methods)


def _below_autograd() -> contextlib.AbstractContextManager:
    functorch = torch._C._are_functorch_transforms_active()
    return _levels_below() if functorch else torch._C._AutoDispatchBelowAutograd()


@contextlib.contextmanager
def _levels_below() -> Iterator[None]:
    """torch switches differentiation off inside a Function; levels of torch.func below this one
    have to see to it themselves."""
    with (
        torch.enable_grad(),
        forward_ad._set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        yield


def _apply(function: type[torch.autograd.Function], inputs: tuple) -> Any:
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    # The dispatcher has already entered one level of torch.func: differentiate at that level.
    from torch._functorch import autograd_function as functorch

    with functorch.enable_single_level_autograd_function():  # type: ignore[attr-defined]
        return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]


def _vmap_rule(operator: Any) -> Callable:
    """One call for each sample. Slices are copied: rows of byte buffers are unaligned."""

    def rule(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        leaves, spec = pytree.tree_flatten(inputs)
        dims = pytree.tree_leaves(in_dims)

        def sample(index: int) -> Any:
            pairs = zip(leaves, dims, strict=True)
            values = [v if dim is None else v.select(dim, index).clone() for v, dim in pairs]
            return pytree.tree_unflatten(values, spec)

        results = [operator(*sample(index)) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule
