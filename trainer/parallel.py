"""A model over several processes: copies of it, shards of it (FSDP2), experts on some of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeForCausalLM

from .config import TrainConfig
from .group import Group
from .layout import Layout

# A parameter of SpreadBlock, and the one of transformers that it is.
STOCK_NAMES = {
    "mlp.moe.router.weight": "mlp.gate.weight",
    "mlp.moe.experts.w1": "mlp.experts.gate_up_proj",
    "mlp.moe.experts.w2": "mlp.experts.down_proj",
}


class SpreadBlock(nn.Module):
    """In place of a sparse block of Qwen3-MoE: its router and experts as a sonicmoe_cpp.MoE, which
    parallelize_experts can spread. After a forward `logits` [T, E] are those of the router."""

    def __init__(self, block: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        import sonicmoe_cpp

        self.moe = sonicmoe_cpp.MoE(
            config.hidden_size, config.intermediate_size, config.num_experts, config.top_k,
            renormalize=True, router=config.router.replace("-", "_"), tile=config.tile,
            policy=config.policy, seed=config.seed, device="meta",
        )  # fmt: skip
        self.moe.router.weight = block.gate.weight
        self.moe.experts.w1 = block.experts.gate_up_proj
        self.moe.experts.w2 = block.experts.down_proj
        self.moe.rounding_seed = torch.tensor([config.seed])
        self.logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.logits, _ = self.moe(x.flatten(0, 1), return_router=True)
        return y.view_as(x)


def spread(
    model: Qwen3MoeForCausalLM, config: TrainConfig, layout: Layout, group: Group
) -> Qwen3MoeForCausalLM | DistributedDataParallel:
    """What to call for the model's forward. A model to shard may lie on the host: every process
    moves its own parts to its device.

    With --dtype bfloat16 layers are gathered in bfloat16, and their gradients summed in float32.
    Copies that autocast makes would stay whole until backward.
    """
    if group.size == 1:
        return model
    if not layout.sharded:
        devices = None if group.device.type == "cpu" else [group.device]
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    kind = group.device.type
    dense = init_device_mesh(kind, (group.size,), mesh_dim_names=("fsdp",))
    if layout.ep > 1:
        shape = (group.size // layout.ep, layout.ep)
        sparse = init_device_mesh(kind, shape, mesh_dim_names=("efsdp", "ep"))
    policy = MixedPrecisionPolicy()
    if config.dtype == "bfloat16":  # the layers' inputs stay in float32, as under autocast
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        if layout.ep > 1:
            _spread_experts(layer.mlp.moe, sparse, layout, policy)
        fully_shard(layer, mesh=dense, mp_policy=policy)
    fully_shard(model, mesh=dense)
    return model


def _spread_experts(
    moe: nn.Module, mesh: dist.DeviceMesh, layout: Layout, policy: MixedPrecisionPolicy
) -> None:
    from sonicmoe_cpp.distributed import parallelize_experts

    parallelize_experts(moe, mesh["ep"], row_capacity=layout.row_capacity or None)
    fully_shard(moe.experts, mesh=mesh["efsdp"], mp_policy=policy)
    moe.experts.set_gradient_divide_factor(mesh.size())  # the mean over all processes' losses
    if mesh.device_type == "cpu":  # gloo has no other; on a mesh of one torch 2.13 divides twice
        moe.experts.set_force_sum_reduction_for_comms(mesh["efsdp"].size() > 1)


def begin_batch(model: nn.Module, last: bool) -> None:
    """Copies of a model meet with the last batch of a step alone. Shards do with every one, or each
    process would hold all gradients."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last


def clip(model: nn.Module, largest: float) -> Tensor:
    """The norm of all gradients of all processes, brought down to `largest`."""
    from sonicmoe_cpp.distributed import clip_grad_norm_

    return clip_grad_norm_(model.parameters(), largest)


# --------------------------------------------------------------------------------------- parameters


def by_stock_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by their names in transformers, in the order of these; as shards where
    they are sharded: a forward without backward leaves some gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    named = {}
    for name, parameter in model.named_parameters():
        for ours, stock in STOCK_NAMES.items():
            name = name.replace(ours, stock)
        named[name] = parameter
    return dict(sorted(named.items()))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(model: nn.Module, group: Group) -> dict[str, Tensor]:
    """All parameters, whole and on the host, for the first process; the others get none.
    Collective."""
    whole = {}
    for name, parameter in by_stock_name(model).items():
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if group.is_first:
            whole[name] = tensor.cpu()
    return whole
