"""MoE under fully_shard, in a process group of this process alone: whatever is a unit of its own,
the layer computes the bits of the plain module."""

import copy
import warnings

import pytest
import sonicmoe_cpp as sm
import torch
import torch.distributed as dist

D, N, E, K = 16, 8, 4, 2

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    return y.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(
    "units", [("",), ("experts",), ("router",), ("router", "experts"), ("router", "experts", "")]
)
def test_every_unit_gives_the_bits_of_the_plain_module(units, reshard, mesh):
    from torch.distributed.fsdp import fully_shard

    module = sm.MoE(D, N, E, K, router_bias=True, expert_bias=True)
    x = torch.randn(8, D)
    right = gradients(copy.deepcopy(module), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a result that is a view
        for unit in units:
            fully_shard(module.get_submodule(unit), mesh=mesh, reshard_after_forward=reshard)
        model = fully_shard(torch.nn.Sequential(module), mesh=mesh)
        for _ in range(2):
            y, grads = gradients(model, x)
    assert torch.equal(y, right[0])
    for ours, theirs in zip(grads, right[1], strict=True):
        assert theirs.abs().max() > 0 and torch.equal(ours.full_tensor(), theirs)


def test_experts_in_bfloat16_leave_the_router_in_float32(mesh):
    """Mixed precision of the experts' unit casts its inputs: not the router's tensors."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {"scoring": "sigmoid_topk", "selection_bias": True, "router_bias": True}
    module = sm.MoE(D, N, E, K, **options)
    plain = copy.deepcopy(module)
    plain.experts.bfloat16()
    x = torch.randn(8, D)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(module.experts, mesh=mesh, mp_policy=policy)
    fully_shard(module.router, mesh=mesh)
    y, grads = gradients(fully_shard(torch.nn.Sequential(module), mesh=mesh), x)
    expected, right = gradients(plain, x.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    for ours, theirs in zip(grads, right, strict=True):
        assert ours.dtype == torch.float32 and theirs.abs().max() > 0
        assert torch.equal(ours.full_tensor(), theirs.float())
