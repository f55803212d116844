"""Transport "nvlink" against one process with the tokens of all ranks: on CPUs through memory that
the processes share; with SONICMOE_TEST_DEVICE=cuda the very kernels, all ranks on one GPU or a GPU
each."""

import gc
import os

import pytest
import ranks
import sonicmoe_cpp as sm
import torch
import torch.distributed as dist
from comparison import same
from program_experts import ROUTINGS
from sonicmoe_cpp import distributed as smd
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

DEVICE = os.environ.get("SONICMOE_TEST_DEVICE", "cpu")
HALF = DEVICE == "cuda"
DTYPE = torch.bfloat16 if HALF else torch.float32
D, N, E, K, T = 16, 16, 12, 3, 20
_shared = {}


def world():
    return dist.get_world_size()


def own(tensor):
    """This rank's part of what all ranks have in rank order."""
    return tensor.chunk(world())[dist.get_rank()]


def context(**options):
    if DEVICE == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    options = {"max_tokens": T, "transport": "nvlink", "timeout_seconds": 120, **options}
    return smd.Context(dist.group.WORLD, D, E, K, dtype=DTYPE, device=DEVICE, **options)


def shared():
    """One context for all cases."""
    return _shared.setdefault("context", context())


def tensors():
    """x, w1, b1, w2, b2, weights of all tokens and experts, equal on every rank."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((world() * T, D), (E, 2 * N, D), (E, 2 * N), (E, D, N), (E, D), (world() * T, K))
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [t.to(DEVICE, DTYPE) for t in made[:-1]] + [made[-1].to(DEVICE)]


def ids_of(routing="uniform"):
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(world() * T)])
    return ROUTINGS[routing](ids).contiguous().to(DEVICE)


def gradient_of_y(count):
    grad = torch.randn(count, D, generator=torch.Generator().manual_seed(3)).mul(2).round()
    return grad.to(DEVICE, DTYPE)


def leaves(given):
    return [tensor.detach().clone().requires_grad_() for tensor in given]


def results_of(function, given, grad):
    """y and the gradients of x, w1, b1, w2, b2, weights."""
    inputs = leaves(given)
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def one_process(ids, **options):
    def function(x, w1, b1, w2, b2, weights):
        return sm.moe(x, w1, w2, ids, weights, b1=b1, b2=b2, **options)

    return results_of(function, tensors(), gradient_of_y(world() * T))


def spread(ids, of=None, **options):
    """The same of this rank."""

    def function(x, w1, b1, w2, b2, weights):
        return smd.moe(x, own(ids), weights, w1, w2, of or shared(), b1, b2, **options)

    return results_of(function, [own(t) for t in tensors()], own(gradient_of_y(world() * T)))


def compare(results, right, part=own):
    """dW, db and dS bit for bit; y and dX within one rounding of each rank's part."""
    unit = world() * 2**-8 if HALF else 1e-6
    for name, result, whole in zip("y x w1 b1 w2 b2 s".split(), results, right, strict=True):
        assert torch.isfinite(result).all(), name
        if name in ("y", "x"):
            assert (result - part(whole)).abs().max() <= unit * whole.abs().max(), name
        else:
            assert torch.equal(result, part(whole) if name == "s" else own(whole)), name


def case_every_routing_equals_one_process():
    for routing in ROUTINGS:
        ids = ids_of(routing)
        right = one_process(ids)
        if routing != "no rows":
            assert all(own(t).abs().sum() > 0 for t in right[:2])
        for options in ({}, {"row_capacity": float(E)}, {"keep_received": True}):
            compare(spread(ids, **options), right)


def case_ranks_have_other_numbers_of_tokens():
    ids, rank = ids_of(), dist.get_rank()
    ends = [T * world() * (r + 1) ** 2 // world() ** 2 for r in range(world())]
    large = context(max_tokens=world() * T)

    def mine(tensor):
        return tensor[ends[rank - 1] if rank else 0 : ends[rank]]

    def function(x, w1, b1, w2, b2, weights):
        return smd.moe(x, mine(ids), weights, w1, w2, large, b1, b2)

    x, *experts, weights = tensors()
    given = [mine(x), *map(own, experts), mine(weights)]
    compare(results_of(function, given, mine(gradient_of_y(world() * T))), one_process(ids), mine)
    large.close()


def case_rows_beyond_the_capacity_are_dropped_and_counted():
    ids, bounded = ids_of("one rank has all"), context()
    rows = int(((ids >= bounded.first_expert) &
                (ids < bounded.first_expert + bounded.local_experts)).sum())  # fmt: skip
    right = one_process(ids, max_rows=128)  # what 1.0 rounds up to; the owner drops the same slots
    for calls in (1, 2):
        compare(spread(ids, bounded, row_capacity=1.0), right)
        assert bounded.rows_dropped.item() == calls * max(rows - 128, 0)
    if world() * T * K > 128:
        with pytest.raises(RuntimeError, match=f"expected room for {world() * T * K} rows on rank"):
            spread(ids, bounded, row_capacity=1.0, on_overflow="raise")
    bounded.close()


def case_contexts_of_one_width_share_their_memory():
    ids = ids_of()
    first, second = context(timeout_seconds=119), context(timeout_seconds=119)
    handle = first.exchange.handle
    assert second.exchange is first.exchange and shared().exchange is not first.exchange
    first.close()
    compare(spread(ids, second), one_process(ids))
    second.close()
    again = context(timeout_seconds=119)
    assert again.exchange.handle != handle
    again.close()


def case_backward_outlives_its_context():
    ids = ids_of()

    def function(x, w1, b1, w2, b2, weights):
        of = context(timeout_seconds=118)
        y = smd.moe(x, own(ids), weights, w1, w2, of, b1, b2)
        del of
        gc.collect()
        return y

    given = [own(t) for t in tensors()]
    compare(results_of(function, given, own(gradient_of_y(world() * T))), one_process(ids))


def case_checkpointing_and_compile_give_the_same_bits():
    ids, of = own(ids_of()), shared()
    given, grad = [own(t) for t in tensors()], own(gradient_of_y(world() * T))

    def plain(x, w1, b1, w2, b2, weights):
        return smd.moe(x, ids, weights, w1, w2, of, b1, b2, row_capacity=2.0)

    def recomputed(*arguments):
        return checkpoint(plain, *arguments, use_reentrant=False)

    right = results_of(plain, given, grad)
    for function in (recomputed, torch.compile(plain, fullgraph=True, backend="aot_eager")):
        for result, expected in zip(results_of(function, given, grad), right, strict=True):
            assert torch.equal(result, expected)


def case_without_gradients_nothing_is_kept():
    ids = ids_of()
    x, w1, b1, w2, b2, weights = (own(t) for t in tensors())
    with torch.no_grad():
        y = smd.moe(x, own(ids), weights, w1, w2, shared(), b1, b2)
    assert torch.equal(y, spread(ids)[0])


def case_a_module_equals_one_process():
    torch.manual_seed(4)
    whole = sm.MoE(D, N, E, K, router_bias=True, expert_bias=True).to(DEVICE, DTYPE)
    torch.manual_seed(4)
    parts = sm.MoE(D, N, E, K, router_bias=True, expert_bias=True).to(DEVICE, DTYPE)
    mesh = init_device_mesh(DEVICE, (world(),))
    smd.parallelize_experts(parts, mesh, transport="nvlink", max_tokens=T)
    x = torch.randn(world() * T, D, generator=torch.Generator().manual_seed(6)).to(DEVICE, DTYPE)
    mine, all_x = own(x).clone().requires_grad_(), x.clone().requires_grad_()
    unit = world() * 2**-7 if HALF else 1e-5
    y, right = parts(mine), whole(all_x)
    same(y, own(right), unit, "y")
    y.square().sum().backward()
    right.square().sum().backward()
    same(mine.grad, own(all_x.grad), unit, "x")
    for name in ("w1", "b1", "w2", "b2"):
        mine, right = (getattr(layer.experts, name).grad for layer in (parts, whole))
        same(mine.to_local(), own(right), unit, "experts." + name)


def case_a_rank_that_does_not_come_is_named():
    short = context(timeout_seconds=0.5)
    spread(ids_of(), short, row_capacity=2.0)
    last = world() - 1
    message = f"rank 0 waited 0.5 s for rank {last} to publish call 3 \\(forward, {T} tokens\\)"
    message += f"; its last was call 2 \\(backward, {T} tokens\\)"
    if dist.get_rank() != last:
        message = message.replace("rank 0", f"rank {dist.get_rank()}", 1)
        with pytest.raises(RuntimeError, match=message):
            spread(ids_of(), short, row_capacity=2.0)
            short.check()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
                short.check()
        with pytest.raises(RuntimeError, match=message):
            short.check()
    dist.barrier()


def case_what_it_cannot_take_is_refused_by_name():
    ids = own(ids_of())
    x, w1, _, w2, _, weights = (own(t) for t in tensors())
    for options, message in (
        ({"shared_tokens": True}, "shared_tokens: expected False"),
        ({"workspace_limit": 1 << 30}, "workspace_limit: expected None"),
        ({"zero_absent_tokens": False}, "zero_absent_tokens: expected True"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            smd.moe(x, ids, weights, w1, w2, shared(), **options)
    flat = ids.flatten()
    tokens = torch.arange(len(flat), device=DEVICE) // K
    with pytest.raises((ValueError, RuntimeError), match='transport "gather" for lists of pairs'):
        smd.moe_pairs(x, tokens, flat, weights.flatten(), w1, w2, shared())
    for options, message in (
        ({"max_tokens": None}, "max_tokens or top_k is None"),
        ({"timeout_seconds": 0}, "timeout_seconds: expected a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            context(**options)
    assert context(transport="auto").exchange is None


if __name__ == "__main__":
    ranks.main()
