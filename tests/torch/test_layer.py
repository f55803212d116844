"""moe_layer and the module MoE: one node equals its parts; training behaviour."""

import copy
import io

import pytest
import sonicmoe_cpp as sm
import torch
from parts import layer_in_parts
from torch.utils.checkpoint import checkpoint

T, D, N, E, K = 48, 24, 8, 6, 2


def layer(**options):
    return sm.MoE(D, N, E, K, **options)


@pytest.mark.parametrize("scoring", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
@pytest.mark.parametrize("router", ["topk", "token_rounding"])
def test_one_node_equals_its_parts(scoring, router):
    module = layer(scoring=scoring, router=router, tile=8, expert_bias=True, router_bias=True)
    x = torch.randn(T, D, requires_grad=True)
    tensors = [x, *module.parameters()]
    grad, grad_logits = torch.randn(T, D), torch.randn(T, E) / 10

    y, logits, rows = module(x, return_router=True)
    ours = torch.autograd.grad((y * grad).sum() + (logits * grad_logits).sum(), tensors)

    parts = torch.nn.functional.linear(x, module.router.weight, module.router.bias)
    expected, counts = layer_in_parts(module, x, parts)
    theirs = torch.autograd.grad((expected * grad).sum() + (parts * grad_logits).sum(), tensors)
    assert torch.equal(module.last_rows_per_expert, counts)
    chosen, _ = sm.route(parts, K, scoring=scoring)
    assert torch.equal(rows.long(), torch.bincount(chosen.flatten(), minlength=E))
    assert torch.equal(module.last_rows_per_expert_before, rows)
    for a, b in zip([y, logits, *ours], [expected, parts, *theirs], strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() < 3e-5 * b.abs().max()


def test_gradient_through_the_logits_alone():
    module = layer()
    _, logits, rows = module(torch.randn(T, D), return_router=True)
    sm.load_balancing_loss(logits, rows, top_k=K).backward()
    assert module.router.weight.grad.abs().max() > 0
    assert (module.experts.w1.grad == 0).all()


def test_eval_is_plain_top_k():
    module = layer(router="token_rounding", tile=16)
    x = torch.randn(T, D)
    module(x)
    assert (module.last_rows_per_expert % 16 == 0).all()
    module.eval()(x)
    assert module.last_rows_per_expert.sum() == T * K
    assert (module.last_rows_per_expert % 16 != 0).any()


@pytest.mark.parametrize("policy", ["nearest", "stochastic"])
@pytest.mark.parametrize("shape", [(15, D), (3, 5, D), (1, D), (0, D)])
def test_a_batch_below_the_tile_is_plain_top_k(shape, policy):
    """The last batch of an epoch may have fewer tokens than a tile, where nothing could be kept."""
    module = layer(router="token_rounding", tile=16, policy=policy)
    plain = layer()
    plain.load_state_dict(module.state_dict())
    x, seed = torch.randn(shape), module.rounding_seed.clone()
    results = [(each(x, return_router=True), each) for each in (module, plain)]
    for (y, _, rows), each in results:
        y.square().sum().backward()
        assert rows.sum() == x[..., 0].numel() * K
        assert torch.equal(each.last_rows_per_expert_before, each.last_rows_per_expert)
    for ours, right in zip(*(result for result, _ in results), strict=True):
        assert torch.equal(ours, right)
    for ours, right in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, right.grad)
        assert right.grad.abs().max() > 0 or x.numel() == 0
    assert torch.equal(module.rounding_seed, seed)
    module(torch.randn(T, D))  # a whole batch is rounded again
    assert (module.last_rows_per_expert % 16 == 0).all()


def test_the_rounding_seed_advances_and_manual_seed_repeats_it():
    module = layer(router="token_rounding", tile=16, policy="stochastic")
    x = torch.randn(T, D)

    def history():
        torch.manual_seed(1)
        seen = []
        for _ in range(12):
            module(x)
            seen.append((int(module.rounding_seed), module.last_rows_per_expert.tolist()))
        return seen

    first = history()
    assert len({seed for seed, _ in first}) == 12
    assert len({tuple(rows) for _, rows in first}) > 1
    assert history() == first


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("policy", ["nearest", "stochastic"])
def test_checkpointing_recomputes_the_same_routing_and_bits(use_reentrant, policy):
    module = layer(router="token_rounding", tile=16, policy=policy)
    batches = [torch.randn(T, D) for _ in range(4)]

    def step(wrap):
        """Two microbatches in flight, as pipelines run them."""
        torch.manual_seed(7)
        module.zero_grad()
        rows, outs = [], []
        inputs = [b.clone().requires_grad_() for b in batches]
        for x in inputs:
            outs.append(checkpoint(module, x, use_reentrant=use_reentrant) if wrap else module(x))
            rows.append(module.last_rows_per_expert.clone())
        for out in outs:
            out.square().sum().backward()
        return rows, outs, [t.grad for t in (*inputs, *module.parameters())]

    plain, again = step(False), step(True)
    for a, b in zip(plain, again, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_main_grad_accumulates_in_float32():
    """256 + 1 is 257 in the buffer; bfloat16 would keep 256."""
    module = layer(main_grad=True, dtype=torch.bfloat16)
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
    module.experts.w1.grad_added_to_main_grad = False
    module.experts.w2.main_grad.fill_(256)
    x = torch.randn(T, D, dtype=torch.bfloat16, requires_grad=True)
    module(x).float().sum().backward()
    plain = layer(dtype=torch.bfloat16)
    plain.load_state_dict(module.state_dict())
    other = x.detach().clone().requires_grad_()
    plain(other).float().sum().backward()
    assert torch.equal(x.grad, other.grad)
    for (name, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        expected = theirs.grad.float() + (256 if name == "experts.w2" else 0)
        error = (ours.main_grad - expected).abs().max()
        assert theirs.grad.abs().max() > 0 and error <= 2**-7 * theirs.grad.abs().max()
    assert module.experts.w1.grad_added_to_main_grad and (module.experts.w1.grad == 0).all()
    assert module.experts.w2.grad is None
    assert (module.experts.w2.main_grad % 1 != 0).any(), "rounded to bfloat16 on the way"


def test_main_grad_256_plus_1():
    module = sm.MoE(1, 1, 1, 1, activation="relu", main_grad=True, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1)
            parameter.main_grad = torch.zeros(parameter.shape)
    for value in (256.0, 1.0):
        module(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert module.experts.w2.main_grad.item() == 257


def test_main_grad_without_a_buffer_is_an_error():
    module = layer(main_grad=True)
    with pytest.raises(RuntimeError, match="main_grad: expected a float32 buffer"):
        module(torch.randn(T, D)).sum().backward()


def test_copies_and_checkpoints_of_the_module():
    module = layer(scoring="sigmoid_topk", selection_bias=True, expert_bias=True)
    x = torch.randn(T, D)
    y = module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    other = layer(scoring="sigmoid_topk", selection_bias=True, expert_bias=True)
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False), other):
        assert torch.equal(twin(x), y)


def test_the_selection_bias_stays_float32():
    module = layer(scoring="sigmoid_topk", selection_bias=True)
    module.router.selection_bias += torch.rand(E)
    exact = module.router.selection_bias.clone()
    module.bfloat16()
    assert module.experts.w1.dtype == torch.bfloat16 and torch.equal(
        module.router.selection_bias, exact
    )


def test_autocast_to_float16_is_refused_by_its_name():
    """x is float32 there: a message about its dtype alone would send the reader astray."""
    module, x = sm.MoE(16, 8, 4, 2), torch.randn(3, 16)
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(RuntimeError, match="x: expected float32 or bfloat16, got float16 of au"),
    ):
        module(x)
    assert module(x).abs().sum() > 0


def test_autocast_keeps_the_router_in_float32():
    module = layer()
    x = torch.randn(2, T // 2, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, logits, _ = module(x, return_router=True)
    assert y.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert y.shape == x.shape and logits.shape == (2, T // 2, E)
    y.float().sum().backward()
    assert module.experts.w1.grad.dtype == torch.float32


def test_bad_options():
    with pytest.raises(ValueError, match="router: expected one of"):
        layer(router="hash")
    with pytest.raises(ValueError, match="activation: expected one of"):
        layer(activation="tanh")
    w1, w2 = torch.randn(E, 2 * N, D), torch.randn(E, D, N)
    with pytest.raises(RuntimeError, match=f"tile: expected .* number of tokens, {T}, got {T + 1}"):
        sm.moe_layer(
            torch.randn(T, D), torch.randn(E, D), w1, w2, K, router="token_rounding", tile=T + 1
        )
