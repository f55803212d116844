"""Whether the parameters of a module may be read instead of calling it.

Hooks, wrappers, offloading, sharding and adapters act when a module is called. Whoever reads its
parameters has to know, at this very forward, that there is nothing of the sort.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker
from transformers.utils import output_capturing

from ..._checks import is_plain


def observer(hook: Callable) -> Callable:
    """Marks a forward hook for a router that looks at the result and changes nothing.

    A replaced block whose router has such hooks keeps its fused layer, which calls them with
    (logits [T, E] float32, None, None). Any other forward hook may change the routing: it makes the
    block call its router and its experts. Returns hook, so it is a decorator too.
    """
    try:
        setattr(getattr(hook, "__func__", hook), "sonicmoe_observer", True)  # noqa: B010
    except AttributeError:
        got = type(hook).__name__
        raise TypeError(f"observer: hook: expected a function of Python, got {got}") from None
    return hook


@functools.cache
def _nested_code(module: types.ModuleType, name: str) -> types.CodeType | None:
    """The code of the local function `name` in one of the functions of module."""
    for function in vars(module).values():
        for constant in getattr(getattr(function, "__code__", None), "co_consts", ()):
            if isinstance(constant, types.CodeType) and constant.co_name == name:
                return constant
    return None


# The hook behind output_router_logits=True. Once installed it stays, and it only records.
_RECORDER = _nested_code(output_capturing, "output_capturing_hook")


def _observes(hook: Callable) -> bool:
    if getattr(hook, "sonicmoe_observer", False):
        return True
    if _RECORDER is not None and getattr(hook, "__code__", None) is _RECORDER:
        return True
    # Names the running module for torch.utils.flop_counter.
    return isinstance(getattr(hook, "__self__", None), ModuleTracker)


def _may_change(hooks: dict) -> bool:
    return not all(_observes(hook) for hook in hooks.values())


def has_hooks(module: nn.Module) -> bool:
    """Hooks of the module itself, observers included."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_own_forward(module: nn.Module, forward: Callable) -> bool:
    """Whether the instance has a forward other than `forward`, its class's."""
    if "forward" not in module.__dict__:
        # Read all the same: torch.compile guards what is read, not what is absent.
        return not isinstance(module.forward, types.MethodType)
    own: Any = module.forward
    bound = isinstance(own, types.MethodType) and own.__self__ is module
    return not (bound and own.__func__ is forward)  # left by accelerate when it removes its hooks


def accelerate_wraps(module: nn.Module, forward: Callable) -> bool:
    """Whether the forward on the instance is accelerate's wrapper around `forward`, which runs what
    stands in module._old_forward between the parts of module._hf_hook."""
    accelerate = sys.modules.get("accelerate.hooks")
    own = module.__dict__.get("forward")
    if accelerate is None or not isinstance(own, functools.partial):
        return False
    code = getattr(own.func, "__code__", None)
    wrapped = getattr(module.__dict__.get("_old_forward"), "__func__", None)
    return wrapped is forward and code is _nested_code(accelerate, "new_forward")


def only_moves(module: nn.Module, forward: Callable) -> bool:
    """Whether that wrapper moves tensors between devices and does nothing else."""
    if not accelerate_wraps(module, forward):
        return False
    accelerate, hook = sys.modules["accelerate.hooks"], cast(Any, module._hf_hook)
    hooks = hook.hooks if type(hook) is accelerate.SequentialHook else (hook,)
    return all(type(each) is accelerate.AlignDevicesHook for each in hooks)


def why_called(
    module: nn.Module, cls: type[nn.Module], forward: Callable, observers: bool = False
) -> str | None:
    """Why module, of class cls with `forward`, has to be called; None where it may be read.

    observers: forward hooks that only look are no reason.
    """
    if type(module) is not cls:
        return f"it is a {type(module).__name__}, not {cls.__name__} itself"
    if cls.forward is not forward or has_own_forward(module, forward):
        return "its forward was replaced"
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if module._forward_hooks_with_kwargs:
        return "it has forward hooks"
    if module._forward_hooks and not (observers and not _may_change(module._forward_hooks)):
        return "it has forward hooks"
    tables = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    if any(_may_change(table) for table in tables):
        return "there are global module hooks"
    return None


def what_may_change_result(
    module: nn.Module, cls: type[nn.Module], forward: Callable
) -> str | None:
    """What may make a call of module return something else than `forward` of cls computes."""
    if not isinstance(module, cls):
        return f"a {type(module).__name__}"
    if type(module).forward is not forward:
        return f"the forward of {type(module).__name__}"
    if has_own_forward(module, forward) and not only_moves(module, forward):
        return "a forward set on the instance"
    if module._forward_hooks_with_kwargs or _may_change(module._forward_hooks):
        return "a forward hook that is not marked with observer()"
    if _may_change(torch_module._global_forward_hooks):
        return "a global forward hook that is not marked with observer()"
    return None


def all_plain(tensors: Iterable[Tensor | None]) -> bool:
    return all(tensor is None or is_plain(tensor) for tensor in tensors)
