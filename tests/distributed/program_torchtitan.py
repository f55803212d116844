"""torchtitan's routed experts by this library, over the ranks of a group, against one process."""

import types

import ranks
import sonicmoe_cpp.integrations.torchtitan as titan
import torch
import torch.distributed as dist
from comparison import full
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

D, F, E, K, T = 16, 12, 8, 2, 24


def built(**options):
    config = RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E),
        token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=E, top_k=K),
    )
    torch.manual_seed(0)
    module = titan.routed_experts(config, **options).build()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def spread(module):
    """As torchtitan's sharding does it, which needs a GPU to make its meshes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = module.inner_experts
    for name, parameter in list(inner.named_parameters()):
        setattr(inner, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    module.parallelize(types.SimpleNamespace(get_optional_mesh=lambda name: mesh))
    return module


def step(module, x, ids, scores):
    x, scores = x.clone().requires_grad_(), scores.clone().requires_grad_()
    counts = torch.bincount(ids.flatten(), minlength=E)
    y = module(x, scores, ids, counts)
    y.square().sum().backward()
    parameters = {name: full(p.grad) for name, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "scores": scores.grad} | parameters


def close(ours, right, name):
    assert ours.shape == right.shape and right.norm() > 0, name
    assert (ours - right).norm() <= 0.02 * right.norm(), name


def case_outputs_and_gradients_are_those_of_one_process():
    world, rank = dist.get_world_size(), dist.get_rank()
    x, scores = torch.randn(world, T, D), torch.rand(world, T, K)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(world * T)]).view(world, T, K)
    right = step(built(), x, ids, scores)
    mine = (t[rank : rank + 1] for t in (x, ids, scores))
    ours = step(spread(built(row_capacity=2.0)), *mine)
    for name in ours:
        whole = name in ("y", "x", "scores")
        close(ours[name], right[name][rank : rank + 1] if whole else right[name], name)


if __name__ == "__main__":
    ranks.main()
