"""The layer with parameter gradients accumulated into buffers of the caller."""

from typing import Any

import torch
from torch import Tensor, nn

from ._autograd import refuse_forward_mode
from ._checks import names_of, refuse
from ._library import ops, run
from ._moe_layer import PARAMETERS, run_backward, save_for_backward


def check_main_grad(x: Tensor) -> None:
    """It is a side effect of backward, on the parameters themselves."""
    reasons = {
        "autocast (parameters would be copies)": x.device.type != "meta"
        and torch.is_autocast_enabled(x.device.type),
        "torch.func": torch._C._are_functorch_transforms_active(),
        "torch.compile, where it needs a graph break": torch.compiler.is_compiling(),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"moe_layer: main_grad: not supported under {reason}")


def check_owner(*modules: nn.Module) -> None:
    """FSDP reduces the gradients of the parameters it gathers, so those have to go to autograd."""
    # fully_shard leaves this on each module whose parameters it gathers, as it does for Dynamo.
    if any(getattr(module, "_is_fsdp_managed_module", False) for module in modules):
        raise ValueError(
            "moe_layer: main_grad: not supported under fully_shard, which owns the gradients of "
            "the parameters that it gathers"
        )


class MainGradLayer(torch.autograd.Function):
    """The layer with parameter gradients accumulated into `param.main_grad` (float32).

    Follows the protocol of Megatron and Transformer Engine: the buffer is looked up at backward
    (`get_main_grad()` or `main_grad`), overwritten where `overwrite_main_grad` is set, and a
    parameter that has the attribute `grad_added_to_main_grad` gets it set to True and a zero
    gradient (so that its hooks fire); any other parameter gets no `.grad`. As with `.grad`, only
    the parameters that a backward pass accumulates into are touched: `autograd.grad()` returns
    gradients and leaves every `main_grad` alone.
    """

    @classmethod
    def call(cls, *inputs: Any) -> tuple:
        refuse_forward_mode("moe_layer", inputs)
        return cls.apply(*inputs)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple:
        output = run(ops.moe_layer_forward, *inputs)
        save_for_backward(ctx, inputs, output)
        ctx.parameters = inputs[1 : 1 + len(PARAMETERS)]
        ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_logits: Tensor | None, *unused: None
    ) -> tuple:
        if grad_out is None and grad_logits is None:
            return (None,) * len(ctx.needs_input_grad)
        need_x = ctx.needs_input_grad[0]
        fates = _fates(ctx)
        if "accumulated" not in fates:
            needs = (need_x, *(fate == "returned" for fate in fates))
            return run_backward(ctx, grad_out, grad_logits, needs)
        added = tuple(fate == "accumulated" for fate in fates)
        parameters = [p for p, is_added in zip(ctx.parameters, added, strict=True) if is_added]
        buffers = tuple(_main_grad(parameter) for parameter in parameters)
        for parameter, buffer in zip(parameters, buffers, strict=True):
            if getattr(parameter, "overwrite_main_grad", False):
                buffer.zero_()
        grads = list(run_backward(ctx, grad_out, grad_logits, (need_x, *added), buffers))
        for place, parameter in enumerate(ctx.parameters, start=1):
            if added[place - 1]:
                grads[place] = _mark_added(parameter)
        return tuple(grads)


def _fates(ctx: Any) -> list[str]:
    """What this pass of autograd does with the gradient of each parameter: "unused",
    "accumulated" (backward()) or "returned" (autograd.grad())."""
    nodes = dict(zip(ctx.tensors, (node for node, _ in ctx.next_functions), strict=True))
    return [_fate(nodes.get(1 + index)) for index in range(len(PARAMETERS))]


def _fate(node: torch.autograd.graph.Node | None) -> str:
    if node is None:  # absent, or requires no gradient
        return "unused"
    try:
        return "accumulated" if torch._C._will_engine_execute_node(node) else "unused"
    except RuntimeError:  # torch's answer for a leaf whose gradient autograd.grad() returns
        return "returned"


def _main_grad(parameter: Tensor) -> Tensor:
    if hasattr(parameter, "get_main_grad"):
        buffer = parameter.get_main_grad()
    else:
        buffer = getattr(parameter, "main_grad", None)
    shape, device = list(parameter.shape), parameter.device
    expected = f"a float32 buffer {shape} on {device}, on the parameter"
    if not isinstance(buffer, Tensor):
        refuse("moe_layer", "main_grad", expected, "none")
    if buffer.dtype != torch.float32 or list(buffer.shape) != shape or buffer.device != device:
        got = f"{names_of((buffer.dtype,))} {list(buffer.shape)} on {buffer.device}"
        refuse("moe_layer", "main_grad", expected, got)
    if buffer.is_neg():
        refuse("moe_layer", "main_grad", expected, "a view with the negative bit")
    return buffer


def _mark_added(parameter: Tensor) -> Tensor | None:
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    return parameter.new_zeros(()).expand(parameter.shape)
