"""Experts on another mesh than the rest, on four ranks: 2 of expert parallelism x 2 of FSDP2."""

import copy
import functools
import itertools
import math

import ranks
import sonicmoe_cpp as sm
import torch
import torch.distributed as dist
from comparison import compare, compare_gradients, full, same, step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

D, N, E, K, T = 16, 8, 4, 2, 12
EP = 2


@functools.cache
def sparse():
    return init_device_mesh("cpu", (2, EP), mesh_dim_names=("efsdp", "ep"))


@functools.cache
def dense():
    return init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))


class Gather(torch.autograd.Function):
    """The rows of all ranks of the mesh "ep"; their gradients are summed, each rank's own."""

    @staticmethod
    def forward(ctx, rows):
        every = rows.new_empty(EP * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(every, rows.contiguous(), group=sparse()["ep"].get_group())
        return every

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=sparse()["ep"].get_group())
        return grad.chunk(EP)[sparse()["ep"].get_local_rank()]


class Scatter(torch.autograd.Function):
    """Sums rows over the ranks of the mesh "ep", each to have its own."""

    @staticmethod
    def forward(ctx, rows):
        return Gather.backward(ctx, rows.clone())

    @staticmethod
    def backward(ctx, grad):
        return Gather.forward(ctx, grad)


class Experts(nn.Module):
    """w1, w2 of all experts or, as DTensors on the mesh "ep", of some: then the tokens of all ranks
    of that mesh come in, and sums over its ranks go out."""

    def __init__(self, moe):
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(w.detach().clone()) for w in moe.parameters())

    def spread(self):
        for name, w in list(self.named_parameters()):
            some = distribute_tensor(w.detach(), sparse()["ep"], [Shard(0)])
            setattr(self, name, nn.Parameter(some))

    def forward(self, x, ids, weights):
        if not isinstance(self.w1, DTensor):
            return sm.moe(x, self.w1, self.w2, ids, weights)
        first = sparse()["ep"].get_local_rank() * (E // EP)
        ids = Gather.apply(ids) - first
        ids = torch.where((ids >= 0) & (ids < E // EP), ids, -1)
        w1, w2 = self.w1.to_local(), self.w2.to_local()
        return Scatter.apply(sm.moe(Gather.apply(x), w1, w2, ids, Gather.apply(weights)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, E)
        self.experts = Experts(sm.MoE(D, N, E, K).experts)

    def forward(self, x):
        return x + self.experts(x, *sm.route(self.router(x), K))


def model():
    return nn.Sequential(Block(), Block(), nn.Linear(D, D))


def spread(plain, dim):
    """A copy, its experts on the mesh (efsdp, ep) and all else on (fsdp,)."""
    both = copy.deepcopy(plain)
    for block in both[:-1]:
        block.experts.spread()
        fully_shard(block.experts, mesh=sparse()["efsdp"], shard_placement_fn=lambda p: Shard(dim))
        block.experts.set_gradient_divide_factor(dist.get_world_size())
        block.experts.set_force_sum_reduction_for_comms(True)  # gloo has no other
        fully_shard(block, mesh=dense())
    return fully_shard(both, mesh=dense())


def batches():
    return torch.randn(dist.get_world_size(), T, D)


def case_two_meshes():
    """Parameters that are DTensors: gradients and clipping of one process."""
    plain, x = model(), batches()
    for dim in (0, 1):
        right = step(plain, x.flatten(0, 1))
        both = spread(plain, dim)
        y, gradients = step(both, x[dist.get_rank()])
        same(y, right[0].chunk(4)[dist.get_rank()], 1e-5)
        compare_gradients(gradients, right[1], 1e-5)
        assert len({p.grad.device_mesh for p in both.parameters()}) == 2
        for norm_type in (2.0, 1.0, 3, math.inf):
            _, gradients = step(both, x[dist.get_rank()])
            _, right = step(plain, x.flatten(0, 1))
            for share in (0.5, 2):  # of the norm: clipped, and not any more
                norm = torch.nn.utils.get_total_norm(right.values(), norm_type)
                most = share * norm.item()
                torch.nn.utils.clip_grad_norm_(plain.parameters(), most, norm_type)
                ours = sm.distributed.clip_grad_norm_(both.parameters(), most, norm_type)
                assert type(ours) is torch.Tensor and abs(ours / norm - 1) < 1e-5
                compare_gradients(gradients, right, 1e-5)


def case_clip_of_torch_takes_one_mesh():
    both = spread(model(), 0)
    step(both, batches()[dist.get_rank()])
    try:
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
    except RuntimeError as error:
        assert "same mesh" in str(error), error
    else:
        raise AssertionError("torch clips over several meshes: the page says it does not")


def case_one_mesh_and_plain_gradients():
    """Of no mesh it is torch's own, bit for bit, and of one mesh but for the order of sums."""
    plain, x = model(), batches()
    sharded = copy.deepcopy(plain)
    for block in sharded[:-1]:
        fully_shard(block, mesh=dense())
    fully_shard(sharded, mesh=dense())
    for one in (plain, sharded):
        results = []
        for clip in (torch.nn.utils.clip_grad_norm_, sm.distributed.clip_grad_norm_):
            step(one, x[dist.get_rank()])
            next(one.parameters()).grad = None  # frozen
            norm = clip(one.parameters(), 0.01)
            kept = [full(p.grad).clone() for p in list(one.parameters())[1:]]
            results.append([full(norm), *kept])
        for theirs, ours in zip(*results, strict=True):
            same(ours, theirs, 0 if one is plain else 1e-6)
    step(plain, x[0])  # the same on every rank
    step(sharded, x[dist.get_rank()])
    w = nn.Parameter(torch.zeros(1))
    assert sm.distributed.clip_grad_norm_(w, 1.0) == 0 == sm.distributed.clip_grad_norm_([], 1.0)
    mixed = [plain[0].router.bias, sharded[1].router.bias, w]
    parts = [full(p.grad).clone() for p in mixed[:2]]
    norm = sm.distributed.clip_grad_norm_(mixed, 1e-3)
    assert torch.allclose(norm, torch.cat(parts).norm()) and norm > 1e-3
    for parameter, part in zip(mixed, parts, strict=False):
        same(parameter.grad, part * 1e-3 / norm, 1e-3)
    for gradient in (math.nan, math.inf):
        w.grad = torch.full((1,), gradient)
        norms = [sm.distributed.clip_grad_norm_(mixed, 1.0, p) for p in (2, math.inf)]
        assert not any(map(torch.isfinite, norms))
    try:
        sm.distributed.clip_grad_norm_(mixed, 1.0, 0)
    except ValueError as error:
        assert "norm_type: expected a number above 0, got 0" in str(error)
    else:
        raise AssertionError("taken")


def case_not_a_number_on_one_rank():
    """Every rank learns of it, also of the largest element."""
    module = fully_shard(nn.Linear(D, D), mesh=dense())
    for rank, norm_type in itertools.product(range(4), (2.0, math.inf)):
        module(torch.ones(1, D)).sum().backward()
        if dist.get_rank() == rank:
            module.weight.grad.to_local()[0, 0] = math.nan
        assert sm.distributed.clip_grad_norm_(module.parameters(), 1.0, norm_type).isnan()


def case_partial_and_replicated_gradients():
    """Each rank holds a part of the sum, or all of it."""
    parts = torch.randn(4, 8)
    w, v = (nn.Parameter(distribute_tensor(torch.zeros(8), dense(), [Replicate()])) for _ in "ab")
    w.grad = DTensor.from_local(parts[dist.get_rank()].clone(), dense(), [Partial()])
    v.grad = DTensor.from_local(parts[0].clone(), dense(), [Replicate()], run_check=False)
    right = torch.cat((parts.sum(0), parts[0]))
    norm = sm.distributed.clip_grad_norm_([w, v], 0.5)
    assert abs(norm / right.norm() - 1) < 1e-6
    same(torch.cat((full(w.grad), full(v.grad))), right * 0.5 / norm, 1e-5)


def case_shards_of_no_element():
    """More ranks than experts, and than there are elements of a bias."""
    plain = nn.Sequential(nn.Linear(D, 3), nn.Linear(3, D), sm.MoE(D, N, 2, 1))
    sharded, x = copy.deepcopy(plain), batches()
    fully_shard(sharded[2].experts, mesh=dense())
    fully_shard(sharded, mesh=dense())
    compare(step(sharded, x[dist.get_rank()]), plain, x)
    for norm_type in (2.0, math.inf):
        _, right = step(plain, x.flatten(0, 1))
        _, gradients = step(sharded, x[dist.get_rank()])
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01, norm_type)
        ours = sm.distributed.clip_grad_norm_(sharded.parameters(), 0.01, norm_type)
        assert abs(ours / norm - 1) < 1e-5
        compare_gradients(gradients, right, 1e-5)


def case_hybrid():
    """Sharded over two ranks, replicated over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    plain, x = nn.Sequential(sm.MoE(D, N, E, K), nn.Linear(D, D)), batches()
    sharded = copy.deepcopy(plain)
    fully_shard(sharded[0].experts, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    y, gradients = step(sharded, x[dist.get_rank()])
    same(y, step(copy.deepcopy(plain), x[dist.get_rank()])[0])
    compare_gradients(gradients, step(plain, x.flatten(0, 1))[1], 1e-5)


def case_the_layer_refuses_dtensors():
    """Experts of which this rank has some: the layer would take its experts for all."""
    module = nn.Sequential(sm.MoE(D, N, E, K))
    experts = module[0].experts
    for name, w in list(experts.named_parameters()):
        some = distribute_tensor(w.detach(), sparse()["ep"], [Shard(0)])
        setattr(experts, name, nn.Parameter(some))
    fully_shard(experts, mesh=sparse()["efsdp"])
    fully_shard(module, mesh=dense())
    try:
        module(torch.randn(T, D))
    except RuntimeError as error:
        assert "moe_layer: w1: expected a plain tensor (to_local()" in str(error), error
    else:
        raise AssertionError("taken")


if __name__ == "__main__":
    ranks.main()
