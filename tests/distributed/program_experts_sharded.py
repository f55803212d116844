"""sm.distributed.parallelize_experts x fully_shard on four ranks: 2 of expert parallelism x 2 of
FSDP2; checkpoints that load under another layout; balance over all tokens."""

import copy
import functools
import tempfile

import ranks
import sonicmoe_cpp as sm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from comparison import compare_gradients, full, same, step
from sonicmoe_cpp import distributed as smd
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

D, N, E, K, T = 16, 8, 8, 2, 12


@functools.cache
def sparse(ep=2):
    return init_device_mesh("cpu", (4 // ep, ep), mesh_dim_names=("efsdp", "ep"))


@functools.cache
def dense():
    return init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(D)
        self.moe = sm.MoE(D, N, E, K, expert_bias=True)

    def forward(self, x):
        return x + self.moe(self.norm(x))


def model():
    return nn.Sequential(Block(), Block(), nn.Linear(D, D))


def spread(plain, ep=2, dim=0, **options):
    """A copy: experts on the mesh (efsdp, ep), all else on (fsdp,)."""
    parts = copy.deepcopy(plain)
    for block in parts[:-1]:
        smd.parallelize_experts(block.moe, sparse(ep)["ep"], **options)
        experts = block.moe.experts
        fully_shard(
            experts, mesh=sparse(ep)["efsdp"],
            shard_placement_fn=lambda p: Shard(dim if p.dim() > dim else 0),
        )  # fmt: skip
        experts.set_gradient_divide_factor(dist.get_world_size())
        # gloo has no other, but on a mesh of one rank torch 2.13 then divides twice.
        experts.set_force_sum_reduction_for_comms(ep < dist.get_world_size())
        fully_shard(block, mesh=dense())
    return fully_shard(parts, mesh=dense())


def sharded(plain):
    """A copy under FSDP2 alone."""
    parts = copy.deepcopy(plain)
    for block in parts[:-1]:
        fully_shard(block, mesh=dense())
    return fully_shard(parts, mesh=dense())


def batches():
    return torch.randn(dist.get_world_size(), T, D)


def case_gradients_are_those_of_one_process():
    plain, x = model(), batches()
    right = step(plain, x.flatten(0, 1))
    for ep, dim in ((2, 0), (2, 1), (4, 0)):
        for options in ({}, {"row_capacity": 4.0}, {"keep_received": False}):
            y, gradients = step(spread(plain, ep, dim, **options), x[dist.get_rank()])
            same(y, right[0].chunk(4)[dist.get_rank()], 1e-5)
            compare_gradients(gradients, right[1], 1e-5)


def case_training_and_clipping():
    plain, x = model(), batches()
    parts, norms = spread(plain), {}
    for one, mine in ((plain, x.flatten(0, 1)), (parts, x[dist.get_rank()])):
        clip = torch.nn.utils.clip_grad_norm_ if one is plain else smd.clip_grad_norm_
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        for _ in range(3):
            step(one, mine)
            norms.setdefault(one, []).append(clip(one.parameters(), 0.1).item())
            optimizer.step()
    assert torch.allclose(torch.tensor(norms[parts]), torch.tensor(norms[plain]), rtol=1e-3)
    for (name, p), q in zip(parts.named_parameters(), plain.parameters(), strict=True):
        same(p, q, 1e-3, name)


def train(one, x, steps=1):
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
    for _ in range(steps):
        step(one, x)
        optimizer.step()
    return optimizer


def case_checkpoints_load_under_another_layout():
    plain, x = model(), batches()[dist.get_rank()]
    saved = spread(plain)
    optimizer = train(saved, x, 2)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    state, optimizer_state = get_state_dict(saved, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder[0])
    torch.manual_seed(9)
    for loaded in (sharded(model()), spread(model(), ep=4), spread(model(), dim=1)):
        other = train(loaded, x)  # so that there is a state to load into
        state, optimizer_state = get_state_dict(loaded, other)
        dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder[0])
        set_state_dict(loaded, other, model_state_dict=state, optim_state_dict=optimizer_state)
        for (name, p), q in zip(loaded.named_parameters(), saved.named_parameters(), strict=True):
            assert torch.equal(full(p), full(q[1])), name
        for (name, p), q in zip(loaded.named_parameters(), saved.parameters(), strict=True):
            ours, theirs = (o.state[r]["exp_avg"] for o, r in ((other, p), (optimizer, q)))
            assert torch.equal(full(ours), full(theirs)), name


def case_the_meta_device():
    with torch.device("meta"):
        parts = model()
    for block in parts[:-1]:
        smd.parallelize_experts(block.moe, sparse()["ep"])
        fully_shard(block.moe.experts, mesh=sparse()["efsdp"])
        fully_shard(block, mesh=dense())
    fully_shard(parts, mesh=dense())
    parts.to_empty(device="cpu")
    for module in parts.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    y, gradients = step(parts, batches()[dist.get_rank()])
    assert torch.isfinite(y).all() and y.abs().sum() > 0
    assert all(full(gradient).abs().sum() > 0 for gradient in gradients.values())


def case_balance_over_all_tokens():
    """The mean of the ranks' losses and the bias are those of one process."""
    torch.manual_seed(2)
    logits = torch.randn(dist.get_world_size() * T, E, requires_grad=True)
    ids, _ = sm.route(logits, K)
    counts = torch.bincount(ids.flatten(), minlength=E).int()
    for scoring in ("softmax_topk", "sigmoid_topk"):
        loss = sm.load_balancing_loss(logits, counts, K, scoring)
        (right,) = torch.autograd.grad(loss, logits)
        mine = logits.detach().chunk(4)[dist.get_rank()].clone().requires_grad_()
        chosen = sm.route(mine, K)[0]
        rows = torch.bincount(chosen.flatten(), minlength=E).int()
        before = rows.clone()
        part = sm.load_balancing_loss(mine, rows, K, scoring, group=dist.group.WORLD)
        assert torch.equal(rows, before)
        (grad,) = torch.autograd.grad(part / 4, mine)
        same(grad, right.chunk(4)[dist.get_rank()], 1e-5)
        mean = part.detach().clone()
        dist.all_reduce(mean)
        same(mean / 4, loss, 1e-5)
    bias, alone = torch.zeros(E), torch.zeros(E)
    sm.update_expert_bias_(bias, rows, 0.1, group=dist.group.WORLD)
    assert torch.equal(bias, sm.update_expert_bias_(alone, counts, 0.1)) and bias.abs().sum() > 0


if __name__ == "__main__":
    ranks.main()
