"""The layer with parameter gradients accumulated into buffers of the caller."""

import torch
from torch import Tensor

from ._autograd import refuse_forward_mode
from ._checks import names_of, refuse
from ._library import ops, run
from ._moe_layer import backward_arguments, save_for_backward


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
    def call(cls, *inputs):
        refuse_forward_mode("moe_layer", inputs)
        return cls.apply(*inputs)

    @staticmethod
    def forward(ctx, *inputs):
        output = run(ops.moe_layer_forward, *inputs)
        save_for_backward(ctx, inputs, output)
        ctx.parameters = inputs[1:7]
        ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_logits, *unused):
        none = (None,) * 25
        if grad_out is None and grad_logits is None:
            return none
        arguments = backward_arguments(ctx, grad_out, grad_logits)
        need_x = ctx.needs_input_grad[0]
        fates = _fates(ctx)
        if "accumulated" not in fates:
            needs = (need_x, *(fate == "returned" for fate in fates))
            grads = run(ops.moe_layer_backward, *arguments, *needs)
            return *(g if n else None for g, n in zip(grads, needs, strict=True)), *none[7:]
        parameters = [
            parameter if fate == "accumulated" else None
            for parameter, fate in zip(ctx.parameters, fates, strict=True)
        ]
        buffers = [None if p is None else _main_grad(p) for p in parameters]
        for parameter, buffer in zip(parameters, buffers, strict=True):
            if getattr(parameter, "overwrite_main_grad", False):
                buffer.zero_()
        grad_x = run(ops.moe_layer_backward_accumulate, *arguments, need_x, *buffers)
        dummies = [None if p is None else _mark_added(p) for p in parameters]
        return grad_x if need_x else None, *dummies, *none[7:]


def _fates(ctx) -> list[str]:
    """What this pass of autograd does with the gradient of each parameter: "unused",
    "accumulated" (backward()) or "returned" (autograd.grad())."""
    nodes = dict(zip(ctx.tensors, (node for node, _ in ctx.next_functions), strict=True))
    return [_fate(nodes.get(index)) for index in range(1, 7)]


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
    return buffer


def _mark_added(parameter: Tensor) -> Tensor | None:
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    return parameter.new_zeros(()).expand(parameter.shape)
