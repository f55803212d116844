"""Experts of a module, spread over the ranks of a mesh of one dimension."""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .._checks import refuse
from .._convert import autocast, constant, matrix
from .._library import ops, run
from .._moe_layer import LayerOutput, count_rows
from .._rules import FLAG, Name, Number, Optional
from ..functional import RouterTensors, router_logits
from ..module import MoE
from ..options import LayerOptions, Packed, joined
from .context import Context
from .exchange import ON_OVERFLOW, moe, moe_pairs
from .rounding import check_policy, own_targets

ROUNDINGS = Name({"rank": 0, "group": 1})


class Exchange:
    """What a module's experts do in place of their own loop, once they are spread: the exchange of
    `moe` through a context, with the options of parallelize_experts."""

    def __init__(
        self,
        context: Context,
        row_capacity: float | None,
        keep_received: bool | None,
        on_overflow: str,
        equal_tokens: bool,
        shared_tokens: bool,
        rounding: str = "rank",
    ) -> None:
        self.context = context
        self.rounding = ROUNDINGS.check("parallelize_experts", "rounding", rounding)
        self.options, self.tokens = self.checked(
            row_capacity, keep_received, on_overflow, equal_tokens, shared_tokens
        )

    @staticmethod
    def checked(
        row_capacity: float | None,
        keep_received: bool | None,
        on_overflow: str,
        equal_tokens: bool,
        shared_tokens: bool,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options of `moe`, and of those what tells of tokens."""
        operation = "parallelize_experts"
        options = {
            "row_capacity": Optional(Number()).check(operation, "row_capacity", row_capacity),
            "keep_received": keep_received,
            "on_overflow": ON_OVERFLOW.check(operation, "on_overflow", on_overflow),
        }
        tokens = {
            "equal_tokens": FLAG.check(operation, "equal_tokens", equal_tokens),
            "shared_tokens": FLAG.check(operation, "shared_tokens", shared_tokens),
        }
        return options, tokens

    def __deepcopy__(self, memo: dict) -> "Exchange":
        return self  # a process group is not copied

    @staticmethod
    def local(tensor: Any) -> Any:
        """The part of a DTensor that this rank holds; gradients flow back into it."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, **arguments: Any) -> Tensor:
        """`moe` of this exchange; `moe_pairs` where token_ids are given."""
        arguments |= self.options | {"context": self.context}
        if "token_ids" not in arguments:
            return moe(x, ids, weights, **arguments, **self.tokens)
        if self.tokens != {"equal_tokens": True, "shared_tokens": False}:
            expected = "equal_tokens=True and shared_tokens=False with token rounding"
            refuse("parallelize_experts", "tokens", expected, self.tokens)
        return moe_pairs(x, arguments.pop("token_ids"), ids, weights, **arguments)

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
        # As the fused layer under autocast: the rows that travel and those that the router sees are
        # in its dtype, the router's sums in float32.
        rows, w1, w2, b1, b2 = autocast("MoE", matrix("MoE", "x", x), *map(self.local, experts))
        logits = router_logits(rows, self.local(router.weight), self.local(router.bias))
        bias = constant(router.selection_bias)
        common = {"w1": w1, "w2": w2, "b1": b1, "b2": b2} | _keywords(layer)
        nothing = logits.new_empty(0, dtype=torch.int32)
        if layer.rounding is None:
            ids, weights = run(ops.route_forward, logits, bias, *layer.router.pack())
            counts = count_rows(ids, self.context.num_experts)
            tokens = listed = nothing
            y = self.experts(rows, ids, weights, **common)
        else:
            tokens, listed, weights, ids, counts, _ = self.round(logits, bias, seed, layer)
            y = self.experts(rows, listed, weights, token_ids=tokens, **common)
        return LayerOutput(
            y=shaped(y, x), logits=shaped(logits, x), rows_per_expert=counts, topk_ids=ids,
            token_ids=tokens, expert_ids=listed, routing_weights=weights, h=rows.new_empty(0),
            metadata=nothing, rows_dropped=nothing,
        )  # fmt: skip

    def round(
        self, logits: Tensor, bias: Tensor | None, seed: Tensor | None, layer: LayerOptions
    ) -> tuple[Tensor, ...]:
        """Results of round_tokens_forward: of this rank's rows, or of those of the group."""
        rounding, router = layer.rounding, layer.router.pack()
        assert rounding is not None
        packed = joined(router, rounding.pack())
        if self.rounding == "rank":
            return run(ops.round_tokens_forward, logits, bias, seed, *packed)
        check_policy("MoE", rounding)
        if logits.is_cuda:
            refuse("parallelize_experts", "rounding", '"rank" on a GPU', "group")
        context = self.context
        with torch.no_grad():
            ids, _ = run(ops.route_forward, logits, bias, *router)
            rows = count_rows(ids, context.num_experts)
            targets = own_targets(rows, len(logits), rounding, context.group, context.rank)
        return run(ops.round_tokens_to_forward, logits, bias, targets, *packed)


def shaped(rows: Tensor, x: Tensor) -> Tensor:
    """[T, ...] with the leading dimensions of x; no view where it has them, of which FSDP2 would
    warn."""
    return rows if x.dim() == 2 else rows.reshape(*x.shape[:-1], -1)


def _keywords(layer: LayerOptions) -> dict[str, Any]:
    experts = layer.experts
    if experts.max_rows is not None:
        refuse("MoE", "max_rows", "None under expert parallelism (row_capacity)", experts.max_rows)
    names = (field.name for field in dataclasses.fields(experts) if field.name != "max_rows")
    return {name: getattr(experts, name) for name in names}


class Target(NamedTuple):
    """What parallelize_experts spreads."""

    experts: nn.Module  # its parameters are sharded, and it gets the exchange
    hidden_size: int
    num_experts: int
    top_k: int | None  # None: its calls say
    finish: Callable[[int], Any]  # with the rank, once the experts are spread


def parallelize_experts(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    transport: str = "auto",
    max_tokens: int | None = None,
    row_capacity: float | None = None,
    keep_received: bool | None = None,
    on_overflow: str = "count",
    equal_tokens: bool = True,
    shared_tokens: bool = False,
    rounding: str = "rank",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Spreads experts over a mesh of one dimension, in place. Collective.

    module: an `MoE`, a block that `replace_moe_blocks` replaced, or the experts module of a model
    of transformers, which from then on runs on this library's backend. Every rank keeps E / size
    experts: their parameters become DTensors, sharded in the first dimension, with the values of
    the mesh's first rank. The router stays whole on every rank (its gradients are to be averaged,
    as FSDP and DDP do). Call it before `fully_shard`, which may shard the experts further over
    another mesh. Options as in `sonicmoe_cpp.distributed.moe`; max_tokens and transport as in
    `Context`. dtype is that of the rows, None: of the parameters; under autocast or a mixed
    precision policy of FSDP "nvlink" wants to know it. With policy `stochastic` every rank draws
    of its own.

    rounding, of token rounding: "rank" makes the rows of an expert a multiple of the tile on every
    rank; "group" only their sum over the ranks, which changes fewer rows, for one collective of E
    numbers. "group" takes the policies nearest, up and down, on CPUs.

    An error leaves the module as it was: another kind of module, experts that are spread already,
    an option, or ranks that differ in sizes, dtype, max_tokens or transport (the error names rank,
    field and both values). Other options must be the same on all ranks too.
    """
    target = _target(module)
    experts = target.experts
    parameters = list(experts.named_parameters(recurse=False))
    options = (row_capacity, keep_received, on_overflow, equal_tokens, shared_tokens)
    Exchange.checked(*options)  # before the context takes memory
    ROUNDINGS.check("parallelize_experts", "rounding", rounding)
    context = Context(
        mesh, target.hidden_size, target.num_experts, target.top_k,
        dtype=dtype or parameters[0][1].dtype, max_tokens=max_tokens, transport=transport,
    )  # fmt: skip
    exchange = Exchange(context, *options, rounding)
    for name, parameter in parameters:
        spread = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        setattr(experts, name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
    experts.exchange = exchange  # type: ignore[assignment]
    target.finish(dist.get_rank())
    return module


def check_whole(experts: nn.Module) -> None:
    if getattr(experts, "exchange", None) is not None:
        expected = "experts that are whole"
        refuse("parallelize_experts", "module", expected, "experts that are spread")


def _target(module: nn.Module) -> Target:
    operation = "parallelize_experts"
    if isinstance(module, MoE):
        check_whole(module.experts)
        if module.main_grad:
            expected = "main_grad=False, as gradients are DTensors"
            refuse(operation, "module", expected, "main_grad=True")
        sizes = (module.hidden_size, module.num_experts, module.top_k)
        return Target(module.experts, *sizes, module.reseed)
    found = None
    if "transformers" in sys.modules:
        hf = importlib.import_module("...integrations.transformers.parallel", __name__)
        found = hf.target(module)
    if found is None:
        expected = "a sonicmoe_cpp.MoE, a replaced block or experts of transformers"
        refuse(operation, "module", expected, type(module).__name__)
    return found


class ExpertParallel(ParallelStyle):
    """parallelize_experts as a style of torch: parallelize_module(model, mesh["ep"],
    {"layers.*.moe": ExpertParallel()}). Keywords as there."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return parallelize_experts(module, device_mesh, **self.options)
