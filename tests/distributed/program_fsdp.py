"""sm.MoE under fully_shard on two ranks, against one process."""

import copy
import functools
import itertools
import warnings

import ranks
import sonicmoe_cpp as sm
import torch
import torch.distributed as dist
from comparison import compare, compare_gradients, full, mean_of, same, step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

D, N, E, K, T = 16, 8, 4, 2, 24


class Block(nn.Module):
    """A residual block around the layer."""

    def __init__(self, **options):
        super().__init__()
        self.norm = nn.RMSNorm(D)
        self.moe = sm.MoE(D, N, E, K, router_bias=True, expert_bias=True, **options)

    def forward(self, x):
        return x + self.moe(self.norm(x))


def model(blocks=2, **options):
    return nn.Sequential(*(Block(**options) for _ in range(blocks)), nn.Linear(D, D))


@functools.cache
def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(plain, *arguments, **options):
    """A copy of plain, sharded."""
    return shard_(copy.deepcopy(plain), *arguments, **options)


def shard_(sharded, units=(), dim=0, **options):
    """Each block a unit and so each of its `units`; experts in dimension dim."""
    options["mesh"] = mesh()

    def placement(parameter):
        return Shard(dim) if parameter.dim() == 3 else None

    for block in sharded:
        for unit in units if isinstance(block, Block) else ():
            fully_shard(block.get_submodule(unit), shard_placement_fn=placement, **options)
        fully_shard(block, shard_placement_fn=placement, **options)
    return fully_shard(sharded, **options)


def batches(*shape):
    return torch.randn(dist.get_world_size(), *(shape or (T,)), D)


def mine(x):
    return x[dist.get_rank()]


UNITS = ((), ("moe",), ("moe.experts",), ("moe.router", "moe.experts"))


def case_units():
    """Whatever is a unit of its own, sharded in whichever dimension, gathered again or kept."""
    plain, x = model(), batches()
    for units, dim, reshard in itertools.product(UNITS, (0, 1), (True, False)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sharded = shard(plain, units, dim, reshard_after_forward=reshard)
            for _ in range(2):
                ours = step(sharded, mine(x))
        w1 = sharded[0].moe.experts.w1
        assert w1.placements == (Shard(dim),) and w1.to_local().numel() * 2 == w1.numel()
        compare(ours, plain, x)


def case_accumulation():
    plain, x = model(), batches(3, T)
    for reshard in (True, False):
        sharded = shard(plain, ("moe.experts",), reshard_after_forward=reshard)
        parts = []
        for microbatches in x:
            twin = copy.deepcopy(plain)
            for part in microbatches:
                twin(part).square().mean().backward()
            parts.append({name: p.grad for name, p in twin.named_parameters()})
        for index, part in enumerate(mine(x)):
            last = index == 2
            sharded.set_requires_gradient_sync(last)
            sharded.set_reshard_after_backward(last)
            sharded(part).square().mean().backward()
        grads = {name: p.grad for name, p in sharded.named_parameters()}
        compare_gradients(grads, mean_of(parts))


def case_mixed_precision():
    """Computed in bfloat16, reduced in float32; the router, a unit of its own, stays in float32."""
    plain, x = model(), batches()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = copy.deepcopy(plain)
    for block in sharded:
        if isinstance(block, Block):
            fully_shard(block.moe.router, mesh=mesh())
        fully_shard(block, mesh=mesh(), mp_policy=policy)
    fully_shard(sharded, mesh=mesh(), mp_policy=policy)
    y, gradients = step(sharded, mine(x))
    half = copy.deepcopy(plain).bfloat16()
    for block, exact in zip(half[:-1], plain, strict=False):
        block.moe.router.load_state_dict(exact.moe.router.state_dict(), assign=True)
        assert block.moe.router.weight.dtype == torch.float32
    parts = [step(copy.deepcopy(half), part.bfloat16()) for part in x]
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in gradients.values())
    same(y, mine(parts)[0])
    compare_gradients(gradients, mean_of([part[1] for part in parts]))
    compare_gradients(gradients, step(copy.deepcopy(plain), x.flatten(0, 1))[1], 0.05)


def case_compile():
    """Block by block. Each is one graph where it is the unit; the hooks of a unit inside break
    it, so torch refuses fullgraph=True there."""
    plain, x = model(1), batches()
    right = step(copy.deepcopy(plain), x.flatten(0, 1))
    for units, reshard in itertools.product(((), ("moe.experts",)), (True, False)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        sharded = copy.deepcopy(plain)
        sharded[0].compile(fullgraph=not units)
        shard_(sharded, units, reshard_after_forward=reshard)
        for _ in range(2):
            y, gradients = step(sharded, mine(x))
        same(y, mine(right[0].chunk(len(x))), 1e-5)
        compare_gradients(gradients, right[1], 1e-5)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs > 1 if units else graphs == 1, graphs
    torch._dynamo.reset()
    sharded[0].compile(fullgraph=True)
    try:
        sharded(mine(x))
    except torch._dynamo.exc.Unsupported:
        return
    raise AssertionError("units inside a whole graph: the page says that torch has none")


ROUNDED = {"router": "token_rounding", "tile": 4, "policy": "stochastic"}


def case_checkpointing():
    """Blocks that run again in backward, and round the same way again."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for options in ({}, ROUNDED):
        plain, x = model(**options), batches()
        for units in ((), ("moe.experts",)):
            sharded = copy.deepcopy(plain)
            for unit in itertools.product(sharded[:-1], units):
                fully_shard(unit[0].get_submodule(unit[1]), mesh=mesh())
            for index in range(2):
                sharded[index] = checkpoint_wrapper(sharded[index])
                fully_shard(sharded[index], mesh=mesh())
            ran = []
            for module in sharded.modules():
                if isinstance(module, sm.MoE):
                    module.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
            torch.manual_seed(3)
            y, gradients = step(fully_shard(sharded, mesh=mesh()), mine(x))
            assert len(ran) == 4, "nothing ran again"
            parts = []
            for part in x:
                torch.manual_seed(3)
                parts.append(step(copy.deepcopy(plain), part))
            same(y, mine(parts)[0])
            compare_gradients(gradients, mean_of([part[1] for part in parts]))


def case_meta():
    """Made on the meta device, sharded, given memory, which holds anything, then initialised."""
    options = ROUNDED | {"scoring": "sigmoid_topk", "selection_bias": True, "seed": 5}
    with torch.device("meta"):
        empty = model(**options)
    sharded = shard(empty, ("moe.experts",)).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in itertools.chain(sharded.parameters(), sharded.buffers()):
            (tensor.to_local() if hasattr(tensor, "to_local") else tensor).fill_(99)
    torch.manual_seed(dist.get_rank())  # on the CPU torch draws every shard alike
    for block in sharded[:-1]:
        block.norm.reset_parameters()
        block.moe.reset_parameters()
        assert (block.moe.router.selection_bias == 0).all() and block.moe.rounding_seed == 5
        for parameter in block.moe.parameters():
            whole = full(parameter)
            assert 0 < whole.abs().max() <= N**-0.5
            assert not torch.equal(*whole.chunk(2)), "every rank has drawn the same"
    sharded[-1].reset_parameters()
    torch.manual_seed(0)
    plain, x = model(**options), batches()
    plain.load_state_dict({name: full(tensor) for name, tensor in sharded.state_dict().items()})
    torch.manual_seed(dist.get_rank())
    y, gradients = step(sharded, mine(x))
    parts = []
    for rank, part in enumerate(x):
        torch.manual_seed(rank)
        parts.append(step(copy.deepcopy(plain), part))
    same(y, mine(parts)[0])
    compare_gradients(gradients, mean_of([part[1] for part in parts]))


def case_state_dict():
    """Full state dicts out and in, buffers too; the plain layer reads them."""
    from torch.distributed.checkpoint import state_dict as checkpoint

    options = {"scoring": "sigmoid_topk", "selection_bias": True}
    plain, x = model(**options), batches()
    for block in plain[:-1]:
        nn.init.normal_(block.moe.router.selection_bias)
    right = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    whole = checkpoint.StateDictOptions(full_state_dict=True)
    sharded = shard(model(**options), ("moe.experts",))
    checkpoint.set_model_state_dict(sharded, copy.deepcopy(right), options=whole)
    ours = step(sharded, mine(x))
    compare(ours, plain, x)
    saved = checkpoint.get_model_state_dict(sharded, options=whole)
    assert saved.keys() == right.keys()
    for name, tensor in saved.items():
        assert torch.equal(full(tensor), right[name]), name


def case_frozen():
    """Parameters without a gradient, beside others of the same unit and as a whole unit."""
    for names in (("w1", "b1"), ("router.",), ("experts.",), ("moe.",)):
        plain, x = model(), batches()
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(not any(word in name for word in names))
        for units in ((), ("moe.router", "moe.experts")):
            compare(step(shard(plain, units), mine(x)), plain, x)


def case_experts_without_a_token():
    """Tokens of a rank are multiples of one, the same to the router, so some experts have none on
    any rank: their gradients are zero, and there."""
    plain, x = model(1), batches(1) * torch.arange(1, T + 1)[:, None]
    ours = step(shard(plain, ("moe.experts",)), mine(x))
    compare(ours, plain, x)
    rows = ours[1]["0.moe.experts.w1"]
    assert rows.to_local().shape[0] == E // 2
    empty = full(rows).flatten(1).abs().amax(1) == 0
    assert 0 < empty.sum() < E


def case_a_rank_without_a_token():
    """T = 0 on one rank: nobody waits, and it gives zeros to the sum."""
    world, plain, x = dist.get_world_size(), model(), batches()
    for empty in range(world):
        for units in UNITS:
            sharded = shard(plain, units, reshard_after_forward=True)
            here = mine(x)[: 0 if dist.get_rank() == empty else T]
            y, gradients = step(sharded, here, tokens=T)
            right = step(copy.deepcopy(plain), x[1 - empty])
            assert y.shape == here.shape
            if dist.get_rank() != empty:
                same(y, right[0])
            right = {name: grad / world for name, grad in right[1].items()}
            compare_gradients(gradients, right)


def case_training():
    """Three steps of AdamW with the bias that balances: parameters of one process."""
    options = {"scoring": "sigmoid_topk", "selection_bias": True}
    plain, x = model(**options), batches(3, T)
    sharded = shard(plain, ("moe.experts",))
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (sharded, plain)]
    for index in range(3):
        for each, tokens in zip(
            (sharded, plain), (mine(x)[index], x[:, index].flatten(0, 1)), strict=True
        ):
            each.zero_grad()
            each(tokens).square().mean().backward()
            for block in each[:-1]:
                rows = block.moe.last_rows_per_expert_before
                if each is sharded:
                    dist.all_reduce(rows)
                sm.update_expert_bias_(block.moe.router.selection_bias, rows, 1e-3)
        for optimizer in optimizers:
            optimizer.step()
    for (name, ours), right in zip(
        sharded.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        same(ours, right, 1e-4, name)


def case_main_grad_is_refused():
    """FSDP2 owns the gradients. Before anything is computed, whatever is the unit."""
    for units in UNITS:
        sharded = shard(model(main_grad=True), units)
        for parameter in sharded.parameters():
            parameter.main_grad = torch.zeros(parameter.shape)
        ran = []
        sharded[0].moe.router.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        try:
            sharded(batches()[0])
        except ValueError as error:
            assert "main_grad: not supported under fully_shard" in str(error)
        else:
            raise AssertionError("taken")
        assert not ran


if __name__ == "__main__":
    ranks.main()
