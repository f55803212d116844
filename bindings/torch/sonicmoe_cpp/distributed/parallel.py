"""Experts of a module, spread over the ranks of a mesh of one dimension."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .._checks import refuse
from .._convert import constant, matrix
from .._library import ops, run
from .._moe_layer import LayerOutput, count_rows
from .._rules import Number, Optional
from ..functional import RouterTensors
from ..module import MoE
from ..options import LayerOptions, Packed, joined
from .context import Context
from .exchange import ON_OVERFLOW, moe, moe_pairs


class Exchange:
    """What a module's experts do in place of their own loop, once they are spread: the exchange of
    `moe` through a context, with the options of parallelize_experts."""

    def __init__(
        self,
        context: Context,
        row_capacity: float | None,
        keep_received: bool | None,
        on_overflow: str,
    ) -> None:
        operation = "parallelize_experts"
        self.context = context
        self.options = {
            "row_capacity": Optional(Number()).check(operation, "row_capacity", row_capacity),
            "keep_received": keep_received,
            "on_overflow": ON_OVERFLOW.check(operation, "on_overflow", on_overflow),
        }

    def __deepcopy__(self, memo: dict) -> "Exchange":
        return self  # a process group is not copied

    def layer(
        self,
        x: Tensor,
        router: RouterTensors,
        experts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        packed: Packed,
        seed: Tensor | None,
        main_grad: bool,
    ) -> LayerOutput:
        """The whole layer: the router here, the experts everywhere. Results as of moe_layer; of H
        and metadata, which the operator of the experts keeps, they hold nothing."""
        if main_grad:
            refuse("MoE", "main_grad", "False under expert parallelism", True)
        layer = LayerOptions.unpack(iter(packed[0]), iter(packed[1]))
        rows = matrix("MoE", "x", x)
        logits = router_logits(rows, router.weight, router.bias)
        bias = constant(router.selection_bias)
        w1, w2, b1, b2 = (local(tensor) for tensor in experts)
        common = {"w1": w1, "w2": w2, "b1": b1, "b2": b2, "context": self.context}
        common |= _keywords(layer) | self.options
        nothing = logits.new_empty(0, dtype=torch.int32)
        if layer.rounding is None:
            ids, weights = run(ops.route_forward, logits, bias, *layer.router.pack())
            counts = count_rows(ids, self.context.num_experts)
            tokens = listed = nothing
            y = moe(rows, ids, weights, **common)
        else:
            packed = joined(layer.router.pack(), layer.rounding.pack())
            tokens, listed, weights, ids, counts, _ = run(
                ops.round_tokens_forward, logits, bias, seed, *packed
            )
            y = moe_pairs(rows, tokens, listed, weights, **common)
        return LayerOutput(
            y=y.reshape(x.shape), logits=logits.reshape(*x.shape[:-1], -1), rows_per_expert=counts,
            topk_ids=ids, token_ids=tokens, expert_ids=listed, routing_weights=weights,
            h=rows.new_empty(0), metadata=nothing, rows_dropped=nothing,
        )  # fmt: skip


def local(tensor: Any) -> Any:
    """The part of a DTensor that this rank holds; gradients flow back into it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wr^T + br, [T, E] float32; in float32, as the sums of the fused layer."""
    bias = None if bias is None else local(bias).float()
    return torch.nn.functional.linear(x.float(), local(weight).float(), bias)


def _keywords(layer: LayerOptions) -> dict[str, Any]:
    experts = layer.experts
    if experts.max_rows is not None:
        refuse("MoE", "max_rows", "None under expert parallelism (row_capacity)", experts.max_rows)
    names = (field.name for field in dataclasses.fields(experts) if field.name != "max_rows")
    return {name: getattr(experts, name) for name in names}


def parallelize_experts(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    transport: str = "auto",
    max_tokens: int | None = None,
    row_capacity: float | None = None,
    keep_received: bool | None = None,
    on_overflow: str = "count",
) -> nn.Module:
    """Spreads the experts of an `MoE` over a mesh of one dimension, in place. Collective.

    Every rank keeps E / size experts: their parameters become DTensors, sharded in the first
    dimension, with the values of the mesh's first rank. The router stays whole on every rank (its
    gradients are to be averaged, as FSDP and DDP do). Call it before `fully_shard`, which may shard
    the experts further over another mesh. Options as in `sonicmoe_cpp.distributed.moe`; max_tokens
    and transport as in `Context`. With policy `stochastic` every rank draws of its own.

    An error leaves the module as it was: another kind of module, experts that are spread already,
    an option, or ranks that differ in any of this (the error names rank, field and both values).
    """
    operation = "parallelize_experts"
    if not isinstance(module, MoE):
        refuse(operation, "module", "a sonicmoe_cpp.MoE", type(module).__name__)
    experts = module.experts
    if experts.exchange is not None:
        refuse(operation, "module", "experts that are whole", "experts that are spread")
    if module.main_grad:
        refuse(operation, "module", "main_grad=False, as gradients are DTensors", "main_grad=True")
    context = Context(
        mesh, module.hidden_size, module.num_experts, module.top_k, dtype=experts.w1.dtype,
        max_tokens=max_tokens, transport=transport,
    )  # fmt: skip
    exchange = Exchange(context, row_capacity, keep_received, on_overflow)
    for name, parameter in list(experts.named_parameters(recurse=False)):
        spread = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        setattr(experts, name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
    experts.exchange = exchange
    module.reseed(dist.get_rank())
    return module


class ExpertParallel(ParallelStyle):
    """parallelize_experts as a style of torch: parallelize_module(model, mesh["ep"],
    {"layers.*.moe": ExpertParallel()}). Keywords as there."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return parallelize_experts(module, device_mesh, **self.options)
