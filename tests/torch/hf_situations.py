"""What users and libraries do to the router or the experts of one block.

Each function changes a block; those whose change can be taken back return how.
"""

import types

import torch
from hf_models import router_name, router_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune


def half_weights(module, inputs, output):
    logits, weights, ids = output
    return logits, weights * 0.5, ids


def other_experts(module, inputs, output):
    logits, weights, ids = output
    return logits, weights, ids.flip(0)


def router_hook(block):
    return router_of(block).register_forward_hook(other_experts).remove


def router_hook_in_place(block):
    """Under no_grad only: transformers' own top-K needs its ids for backward."""

    def roll(module, inputs, output):
        output[2].copy_(output[2].roll(1, 0))

    return router_of(block).register_forward_hook(roll).remove


def router_hook_with_kwargs(block):
    def hook(module, inputs, kwargs, output):
        return half_weights(module, inputs, output)

    return router_of(block).register_forward_hook(hook, with_kwargs=True).remove


def router_pre_hook(block):
    return router_of(block).register_forward_pre_hook(lambda module, x: (x[0] * 0.7,)).remove


def router_backward_hook(block):
    hook = router_of(block).register_full_backward_hook(lambda m, grads, _: (grads[0] * 3,))
    return hook.remove


def experts_hook(block):
    return block.experts.register_forward_hook(lambda module, inputs, y: 2 * y).remove


def experts_pre_hook(block):
    def hook(module, inputs):
        x, ids, weights = inputs
        return x, ids.flip(0), weights

    return block.experts.register_forward_pre_hook(hook).remove


def experts_backward_hook(block):
    def hook(module, grads):
        return (grads[0] * 3,)

    return block.experts.register_full_backward_pre_hook(hook).remove


def router_forward_on_the_instance(block):
    router = router_of(block)
    inner = router.forward
    router.forward = lambda x: half_weights(router, x, inner(x))
    return lambda: delattr(router, "forward")


def experts_method_on_the_instance(block):
    forward = type(block.experts).forward
    block.experts.forward = types.MethodType(lambda self, *a: 2 * forward(self, *a), block.experts)
    return lambda: delattr(block.experts, "forward")


def router_of_a_subclass(block):
    router, stock = router_of(block), type(router_of(block))

    class Halved(stock):
        def forward(self, x):
            return half_weights(self, x, super().forward(x))

    router.__class__ = Halved
    return lambda: setattr(router, "__class__", stock)


def experts_of_a_subclass(block):
    experts, stock = block.experts, type(block.experts)

    class Doubled(stock):
        def forward(self, *inputs):
            return 2 * super().forward(*inputs)

    experts.__class__ = Doubled
    return lambda: setattr(experts, "__class__", stock)


class Wrapper(nn.Module):
    def __init__(self, inner, change):
        super().__init__()
        self.inner = inner
        self.change = change

    def forward(self, *inputs):
        return self.change(self, inputs, self.inner(*inputs))


def router_wrapped(block):
    name, router = router_name(block), router_of(block)
    setattr(block, name, Wrapper(router, other_experts))
    return lambda: setattr(block, name, router)


def experts_wrapped(block):
    experts = block.experts
    block.experts = Wrapper(experts, lambda module, inputs, y: 2 * y)
    return lambda: setattr(block, "experts", experts)


def router_checkpointed(block):
    setattr(block, router_name(block), checkpoint_wrapper(router_of(block)))


def experts_checkpointed(block):
    block.experts = checkpoint_wrapper(block.experts)


def experts_compiled(block):
    block.experts = torch.compile(block.experts, backend="eager")


class Rolled(nn.Module):
    def forward(self, weight):
        return weight.roll(1, 0)


def router_parametrized(block):
    parametrize.register_parametrization(router_of(block), "weight", Rolled(), unsafe=True)


def router_weight_normed(block):
    parametrizations.weight_norm(router_of(block), "weight")
    nn.init.ones_(router_of(block).parametrizations.weight.original0)


def experts_parametrized(block):
    parametrize.register_parametrization(block.experts, "down_proj", Rolled(), unsafe=True)


def router_pruned(block):
    prune.l1_unstructured(router_of(block), "weight", 0.4)


def experts_pruned(block):
    prune.l1_unstructured(block.experts, "gate_up_proj", 0.4)


SITUATIONS = [
    router_hook,
    router_hook_with_kwargs,
    router_pre_hook,
    router_backward_hook,
    experts_hook,
    experts_pre_hook,
    experts_backward_hook,
    router_forward_on_the_instance,
    experts_method_on_the_instance,
    router_of_a_subclass,
    experts_of_a_subclass,
    router_wrapped,
    experts_wrapped,
    router_checkpointed,
    experts_checkpointed,
    experts_compiled,
    router_parametrized,
    router_weight_normed,
    experts_parametrized,
    router_pruned,
    experts_pruned,
]
# These change no result, or only a gradient.
SAME_LOGITS = {
    router_backward_hook,
    experts_backward_hook,
    router_checkpointed,
    experts_checkpointed,
    experts_compiled,
}
