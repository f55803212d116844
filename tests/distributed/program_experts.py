"""Experts spread over the ranks of a group, against one process with the tokens of all ranks."""

import contextlib
import copy
import os

import pytest
import ranks
import sonicmoe_cpp as sm
import torch
import torch.distributed as dist
from comparison import full, same
from sonicmoe_cpp import distributed as smd
from sonicmoe_cpp.distributed.rounding import POLICIES, shared_targets
from sonicmoe_cpp.options import RoundingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

D, N, E, K, T = 16, 12, 12, 3, 20


def world():
    return dist.get_world_size()


def own(tensor):
    """This rank's part of what all ranks have in rank order."""
    return tensor.chunk(world())[dist.get_rank()]


def context(**options):
    return smd.Context(dist.group.WORLD, D, E, K, dtype=torch.float32, **options)


def tensors(integers=False):
    """x, w1, b1, w2, b2, weights of all tokens and experts, equal on every rank."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((world() * T, D), (E, 2 * N, D), (E, 2 * N), (E, D, N), (E, D), (world() * T, K))

    def values(shape):
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    return [values(shape) for shape in shapes]


ROUTINGS = {
    "uniform": lambda ids: ids,
    "one rank has all": lambda ids: ids % (E // world()),
    "one rank has none": lambda ids: ids % (E - E // world()),
    "dropped slots": lambda ids: torch.where(ids % 3 == 0, -1, ids),
    "ids past int32": lambda ids: torch.where(ids % 3 == 0, ids + 2**32, ids),
    "no rows": lambda ids: torch.full_like(ids, -1),
    "duplicates": lambda ids: ids[:, :1].expand_as(ids),
}


def ids_of(routing="uniform"):
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(world() * T)])
    return ROUTINGS[routing](ids).contiguous()


def gradient_of_y(count):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(3)).mul(2).round()


def leaves(*given):
    return [tensor.detach().clone().requires_grad_() for tensor in given]


def one_process(given, ids, **options):
    """y and the gradients of x, w1, b1, w2, b2, weights."""
    x, w1, b1, w2, b2, weights = inputs = leaves(*given)
    y = sm.moe(x, w1, w2, ids, weights, b1=b1, b2=b2, **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, gradient_of_y(len(x)).to(y.dtype))]


def spread(given, ids, shared, **options):
    """The same of this rank."""
    x, w1, b1, w2, b2, weights = inputs = leaves(*map(own, given))
    y = smd.moe(x, own(ids), weights, w1, w2, shared, b1, b2, **options)
    grad = own(gradient_of_y(world() * T)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def compare(results, right, tolerance):
    """dW, db and dS bit for bit; y and dX within one rounding of each rank's part."""
    for name, result, whole in zip("y x w1 b1 w2 b2 s".split(), results, right, strict=True):
        assert torch.isfinite(result).all(), name
        if name in ("y", "x"):
            allowed = tolerance * whole.abs().max()
            assert (result - own(whole)).abs().max() <= allowed, name
        else:
            assert torch.equal(result, own(whole)), name


def case_every_routing_equals_one_process():
    for routing in ROUTINGS:
        ids = ids_of(routing)
        right = one_process(tensors(), ids)
        if routing != "no rows":
            assert all(own(t).abs().sum() > 0 for t in right[:2])
        for options in ({}, {"row_capacity": float(E)}, {"keep_received": False}):
            compare(spread(tensors(), ids, context(), **options), right, 1e-6)


def case_integers_are_exact():
    given, options = tensors(integers=True), {"activation": "reglu"}
    right = one_process(given, ids_of(), **options)
    compare(spread(given, ids_of(), context(), **options), right, 0.0)


def case_bfloat16_parts_are_rounded_once():
    given = [tensor.bfloat16() for tensor in tensors()]
    shared = smd.Context(dist.group.WORLD, D, E, K, dtype=torch.bfloat16)
    right = one_process(given, ids_of())
    results = spread(given, ids_of(), shared)
    compare(results, right, world() * 2**-8)
    exact = one_process([tensor.float() for tensor in given], ids_of())[0]
    error = (results[0].float() - own(exact)).abs().max()
    naive = (own(right[0]).float() - own(exact)).abs().max()
    assert error <= 2 * naive + 2**-8 * exact.abs().max()


def case_a_wrong_exchange_is_noticed():
    """The comparison rejects a swapped rank, a dropped expert and a part that is added twice."""
    right = one_process(tensors(), ids_of())
    results = spread(tensors(), ids_of(), context())
    shifted = [own(whole.roll(T, 0)) if i < 2 else r for i, (whole, r) in
               enumerate(zip(right, results, strict=True))]  # fmt: skip
    dropped = [r.clone() for r in results]
    dropped[2][0] = 0
    twice = [2 * results[0], *results[1:]]
    for wrong in (shifted, dropped, twice):
        with pytest.raises(AssertionError):
            compare(wrong, right, 1e-6)


def case_rows_beyond_the_capacity_are_dropped_and_counted():
    ids, shared = ids_of("one rank has all"), context()
    rows = int(((ids >= shared.first_expert) &
                (ids < shared.first_expert + shared.local_experts)).sum())  # fmt: skip
    most = 128  # what 1.0 rounds up to
    results = spread(tensors(), ids, shared, row_capacity=1.0)
    assert shared.rows_dropped.item() == max(rows - most, 0)
    # As one process in which the owner's bound drops the same slots.
    right = one_process(tensors(), ids, max_rows=most)
    compare(results, right, 1e-6)
    spread(tensors(), ids, shared, row_capacity=1.0)
    assert shared.rows_dropped.item() == 2 * max(rows - most, 0)


def case_an_overflow_raises_on_every_rank_where_it_is_asked_to():
    ids, shared = ids_of("one rank has all"), context()
    x, w1, _, w2, _, weights = map(own, tensors())
    rows = world() * T * K
    message = f"row_capacity: expected room for {rows} rows on rank 0, got 128 rows"
    raises = pytest.raises(RuntimeError, match=message)
    with raises if rows > 128 else contextlib.nullcontext():
        y = smd.moe(x, own(ids), weights, w1, w2, shared, row_capacity=1.0, on_overflow="raise")
        assert y.abs().sum() > 0


def case_checkpointing_and_compile_give_the_same_bits():
    shared = context()
    given = list(map(own, tensors()))
    ids = own(ids_of())

    def run(function):
        x, w1, b1, w2, b2, weights = inputs = leaves(*given)
        y = function(x, ids, weights, w1, w2, b1, b2)
        return [y.detach(), *torch.autograd.grad(y, inputs, own(gradient_of_y(world() * T)))]

    def plain(x, ids, weights, w1, w2, b1, b2):
        return smd.moe(x, ids, weights, w1, w2, shared, b1, b2, row_capacity=2.0)

    def recomputed(*arguments):
        return checkpoint(plain, *arguments, use_reentrant=False)

    right = run(plain)
    for function in (recomputed, torch.compile(plain, fullgraph=True, backend="aot_eager")):
        for result, expected in zip(run(function), right, strict=True):
            assert torch.equal(result, expected)


def case_torch_compile_asks_for_a_capacity():
    shared = context()
    x, w1, _, w2, _, weights = map(own, tensors())
    compiled = torch.compile(smd.moe, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="row_capacity: expected a number under torch.compile"):
        compiled(x, own(ids_of()), weights, w1, w2, shared)


# ----------------------------------------------------------------------------------------- modules


def layers(rounding="rank", **options):
    """A layer whole, and the same spread over all ranks."""
    torch.manual_seed(4)
    whole = sm.MoE(D, N, E, K, router_bias=True, expert_bias=True, **options)
    mesh = init_device_mesh("cpu", (world(),), mesh_dim_names=("ep",))
    return whole, smd.parallelize_experts(copy.deepcopy(whole), mesh["ep"], rounding=rounding)


def compare_layers(whole, parts, **tolerances):
    x = torch.randn(world() * T, D, generator=torch.Generator().manual_seed(6))
    mine, all_x = own(x).clone().requires_grad_(), x.clone().requires_grad_()
    y, logits, rows = parts(mine, return_router=True)
    right, right_logits, right_rows = whole(all_x, return_router=True)
    same(y, own(right), 1e-6, "y")
    same(logits, own(right_logits), 1e-6, "logits")
    counts = rows.clone()
    dist.all_reduce(counts)
    assert torch.equal(counts, right_rows)
    (y.square().sum() + logits.square().mean()).backward()
    (right.square().sum() + right_logits.square().mean() * world()).backward()
    same(mine.grad, own(all_x.grad), 1e-5, "x")
    for (name, p), q in zip(parts.named_parameters(), whole.parameters(), strict=True):
        grad = full(p.grad).clone()
        if name.startswith("router"):
            dist.all_reduce(grad)
        same(grad, q.grad, 1e-5, name)


def case_a_module_equals_one_process():
    whole, parts = layers()
    for name, parameter in parts.experts.named_parameters():
        assert parameter.to_local().shape[0] == E // world(), name
    compare_layers(whole, parts)


def case_every_scoring_and_bias():
    for options in (
        {"scoring": "sigmoid_topk", "selection_bias": True, "scale": 2.5},
        {"scoring": "topk_softmax"},
        {"renormalize": True, "activation": "geglu", "gate_up_layout": "interleaved"},
    ):
        compare_layers(*layers(**options))


def case_logits_have_the_bits_of_the_fused_layer():
    whole, parts = layers()
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(7))
    assert torch.equal(parts(x, return_router=True)[1], whole(x, return_router=True)[1])


def case_autocast_leaves_the_routers_sums_in_float32():
    whole, parts = layers()
    x = torch.randn(world() * T, D, generator=torch.Generator().manual_seed(6))
    with torch.autocast("cpu", torch.bfloat16):
        y, logits, _ = parts(own(x), return_router=True)
        right, right_logits, _ = whole(x, return_router=True)
    assert y.dtype == right.dtype == torch.bfloat16 and logits.dtype == torch.float32
    same(logits, own(right_logits), 1e-6, "logits")
    same(y, own(right), 2**-7, "y")


def case_each_rank_rounds_its_own_tokens():
    whole, parts = layers(router="token_rounding", tile=4)
    x = torch.randn(world(), T, D, generator=torch.Generator().manual_seed(6))
    y = parts(x[dist.get_rank()])
    same(y, whole(x[dist.get_rank()]), 1e-6, "y")  # rounding is of the tokens at hand
    assert torch.equal(parts.last_rows_per_expert, whole.last_rows_per_expert)
    assert int(parts.last_rows_per_expert.sum()) % 4 == 0
    seeds = torch.tensor([parts.seed])
    everyones = [torch.empty_like(seeds) for _ in range(world())]
    dist.all_gather(everyones, seeds)
    assert len({int(seed) for seed in everyones}) == world()


def case_the_group_rounds_its_tokens_together():
    for policy in ("nearest", "up", "down"):
        whole, parts = layers(router="token_rounding", tile=8, policy=policy, rounding="group")
        x = torch.randn(world() * T, D, generator=torch.Generator().manual_seed(6))
        whole(x)
        mine = own(x).clone().requires_grad_()
        y = parts(mine)
        counts = parts.last_rows_per_expert.clone()
        before = parts.last_rows_per_expert_before.clone()
        assert (counts - before).abs().max() < 8
        dist.all_reduce(counts)
        assert torch.equal(counts, whole.last_rows_per_expert) and (counts % 8 == 0).all()
        if policy == "nearest":
            assert (parts.last_rows_per_expert % 8 != 0).any()
        y.square().sum().backward()
        assert mine.grad.abs().sum() > 0 and parts.router.weight.grad.abs().sum() > 0


def case_every_rank_adds_and_drops_its_share():
    """Against the definition, in Python's integers."""
    generator = torch.Generator().manual_seed(8)
    for case in range(30):
        size, tokens, tile = 1 + case % 5, 9, (2, 4, 7)[case % 3]
        policy = POLICIES[case % len(POLICIES)]
        counts = torch.randint(0, tokens + 1, (size, 6), generator=generator)
        options = RoundingOptions(tile=tile, policy=policy)
        ours = shared_targets(counts, tokens, options)
        assert ours.min() >= 0 and ours.max() <= tokens
        assert (ours.sum(0) % tile == 0).all()
        for e in range(6):
            f, after = counts[:, e].tolist(), int(ours[:, e].sum())
            change = after - sum(f)
            products, total = [abs(change) * count for count in f], max(sum(f), 1)
            parts = [product // total for product in products]
            order = sorted(range(size), key=lambda r: (-(products[r] % total), (r - e) % size))
            for r in order[: abs(change) - sum(parts)]:
                parts[r] += 1
            expected = [c + (p if change > 0 else -p) for c, p in zip(f, parts, strict=True)]
            if max(expected) <= tokens:
                assert ours[:, e].tolist() == expected, (case, e)


def case_policies_that_no_group_rounds_by_are_named():
    _, parts = layers(router="token_rounding", tile=4, policy="balanced", rounding="group")
    expected = 'policy: expected one of nearest, up, down with rounding="group", got .balanced'
    with pytest.raises(ValueError, match=expected):
        parts(torch.randn(T, D))


def case_a_style_of_torch():
    torch.manual_seed(4)
    whole = torch.nn.Sequential(sm.MoE(D, N, E, K))
    mesh = init_device_mesh("cpu", (world(),))
    parts = parallelize_module(copy.deepcopy(whole), mesh, {"0": smd.ExpertParallel()})
    x = torch.randn(T, D)
    same(parts(x), whole(x), 1e-6)
    assert parts[0].experts.w1.placements == parts[0].experts.w2.placements


def case_the_values_are_those_of_the_first_rank():
    torch.manual_seed(dist.get_rank())
    layer = sm.MoE(D, N, E, K)
    first = [layer.experts.w1.detach().clone()]
    dist.broadcast(first[0], 0)
    smd.parallelize_experts(layer, init_device_mesh("cpu", (world(),)))
    assert torch.equal(full(layer.experts.w1), first[0])


def case_ranks_that_differ_are_named_on_every_rank():
    rank = dist.get_rank()
    for field, values in (
        ("top_k", (2, 3)),
        ("hidden_size", (D, D + 1)),
        ("max_tokens", (None, 9)),
    ):
        mine = values[rank == world() - 1]
        given = {"hidden_size": D, "num_experts": E, "top_k": K, field: mine}
        message = f"Context: {field}: expected {values[0]} on rank {world() - 1}, as on rank 0"
        with pytest.raises(ValueError, match=f"{message}, got {values[1]}"):
            smd.Context(dist.group.WORLD, dtype=torch.float32, **given)


def case_unequal_numbers_of_tokens_are_named(monkeypatch=None):
    os.environ["SONICMOE_CHECK"] = "1"
    try:
        x, w1, _, w2, _, weights = map(own, tensors())
        count = T - 1 if dist.get_rank() == world() - 1 else T
        shared = context()
        with pytest.raises(
            ValueError, match=f"x: expected {T} tokens on rank {world() - 1}, as on"
        ):
            smd.moe(x[:count], own(ids_of())[:count], weights[:count], w1, w2, shared)
    finally:
        del os.environ["SONICMOE_CHECK"]


def case_options_that_an_exchange_cannot_honour():
    x, w1, _, w2, _, weights = map(own, tensors())
    with pytest.raises(
        RuntimeError, match="zero_absent_tokens: expected True, as all ranks' parts"
    ):
        smd.moe(x, own(ids_of()), weights, w1, w2, context(), zero_absent_tokens=False)
    for options in ({"zero_absent_tokens": False}, {"max_rows": 9}):
        layer = sm.MoE(D, N, E, K, **options)
        smd.parallelize_experts(layer, init_device_mesh("cpu", (world(),)))
        with pytest.raises(RuntimeError, match=next(iter(options))):
            layer(x)


def case_refusals_leave_the_module_whole():
    mesh = init_device_mesh("cpu", (world(),))
    layer = sm.MoE(D, N, E, K)
    before = {name: p for name, p in layer.named_parameters()}
    for options, message in (
        (
            {"transport": "pigeons"},
            "transport: expected one of auto, gather, nvlink, got 'pigeons'",
        ),
        ({"row_capacity": "much"}, "row_capacity: expected a finite number"),
        ({"on_overflow": "cry"}, "on_overflow: expected one of count, raise"),
        ({"max_tokens": 0}, "max_tokens: expected"),
        ({"rounding": "host"}, "rounding: expected one of rank, group, got 'host'"),
    ):
        with pytest.raises(ValueError, match=message):
            smd.parallelize_experts(layer, mesh, **options)
    with pytest.raises(RuntimeError, match="module: expected a sonicmoe_cpp.MoE, .* got Linear"):
        smd.parallelize_experts(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(RuntimeError, match="main_grad"):
        smd.parallelize_experts(sm.MoE(D, N, E, K, main_grad=True), mesh)
    with pytest.raises(
        ValueError, match=f"num_experts: expected a multiple of the {world()} ranks"
    ):
        smd.parallelize_experts(sm.MoE(D, N, world() * 2 + 1, K), mesh)
    assert all(p is before[name] for name, p in layer.named_parameters())
    smd.parallelize_experts(layer, mesh)
    with pytest.raises(RuntimeError, match="module: expected experts that are whole"):
        smd.parallelize_experts(layer, mesh)


if __name__ == "__main__":
    ranks.main()
