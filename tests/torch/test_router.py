"""Routing, token rounding and the balancing losses against plain PyTorch in float64."""

import eager
import pytest
import sonicmoe_cpp as sm
import torch
from sonicmoe_cpp.functional import router_logits
from sonicmoe_cpp.options import RoundingOptions, RouterOptions, joined

T, E, K = 40, 12, 3
SCORINGS = [
    {"scoring": "softmax_topk"},
    {"scoring": "softmax_topk", "renormalize": True, "scale": 1.5},
    {"scoring": "topk_softmax"},
    {"scoring": "sigmoid_topk"},
    {"scoring": "sigmoid_topk", "renormalize": False, "scale": 2.5},
    {"scoring": "sigmoid_topk", "num_groups": 4, "top_groups": 2, "selection_bias": True},
]


def with_bias(options):
    return (
        options | {"selection_bias": torch.randn(E) / 4}
        if options.get("selection_bias")
        else options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_those_of_the_layer(dtype, router_dtype, bias):
    if dtype == torch.float32 and router_dtype == torch.bfloat16:
        with pytest.raises(RuntimeError, match="router_weight: expected float32, got bfloat16"):
            router_logits(torch.randn(T, 8), torch.randn(E, 8, dtype=router_dtype))
        return
    tokens, width = 300, 270  # more than a block of either
    x = torch.randn(2, tokens // 2, width).to(dtype).requires_grad_()
    weight = torch.randn(E, width).to(router_dtype).requires_grad_()
    shift = torch.randn(E).to(router_dtype).requires_grad_() if bias else None
    w1, w2 = torch.randn(E, 8, width).to(dtype), torch.randn(E, width, 4).to(dtype)
    logits = router_logits(x, weight, shift)
    assert torch.equal(logits, sm.moe_layer(x, weight, w1, w2, K, router_bias=shift)[1])

    inputs = [x, weight] if shift is None else [x, weight, shift]
    grad = torch.randn(logits.shape)
    ours = torch.autograd.grad(logits, inputs, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.nn.functional.linear(*exact)
    right = torch.autograd.grad(expected, exact, grad.double())
    for mine, double, given in zip(ours, right, inputs, strict=True):
        assert mine.dtype == given.dtype and mine.shape == given.shape
        rounding = 2**-8 if given.dtype == torch.bfloat16 else 1e-5
        assert (mine.double() - double).abs().max() <= rounding * double.abs().max()


def test_logits_keep_no_copy_of_x():
    x, weight = torch.randn(T, 8).bfloat16(), torch.randn(E, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        router_logits(x, weight)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("options", SCORINGS, ids=str)
def test_route(options):
    options = with_bias(options)
    logits = torch.randn(T, E, requires_grad=True)
    ids, weights = sm.route(logits, K, **options)
    double = logits.detach().double().requires_grad_()
    expected_ids, expected = eager.route(double, K, **options)
    assert ids.dtype == torch.int64 and torch.equal(ids, expected_ids)
    assert torch.allclose(weights.double(), expected, rtol=1e-5)
    grad = torch.randn(T, K)
    weights.backward(grad)
    expected.backward(grad.double())
    largest = double.grad.abs().max()
    assert largest > 1e-2
    assert (logits.grad - double.grad).abs().max() < 1e-5 * largest


@pytest.mark.parametrize(
    "policy", ["nearest", "up", "down", "stochastic", "balanced", "nearest_score"]
)
@pytest.mark.parametrize("options", SCORINGS[1:4], ids=str)
def test_round_tokens(policy, options):
    tile, k = 8, K
    logits = torch.randn(T, E, requires_grad=True)
    tokens, experts, weights = sm.round_tokens(
        logits, k, tile=tile, policy=policy, seed=3, **options
    )
    used = tokens >= 0
    assert torch.equal(used, experts >= 0) and (weights[~used] == 0).all()
    pairs = set(zip(tokens[used].tolist(), experts[used].tolist(), strict=True))
    assert len(pairs) == int(used.sum())
    before = torch.bincount(sm.route(logits, k, **options)[0].flatten(), minlength=E)
    after = torch.bincount(experts[used].long(), minlength=E)
    assert (after % tile == 0).all() and ((after - before).abs() < tile).all()
    if policy == "up":
        assert (after >= before).all() and (after > before).any()
    if policy == "down":
        assert (after <= before).all() and (after < before).any()

    double = logits.detach().double().requires_grad_()
    ids, _ = eager.route(double, k, **options)
    expected = options.get("scale", 1.0) * eager.pair_weights(
        double, ids, tokens[used], experts[used], options["scoring"], True
    )
    assert torch.allclose(weights[used].double(), expected, rtol=1e-5)
    grad = torch.randn(tokens.shape)
    weights.backward(grad)
    expected.backward(grad[used].double())
    largest = double.grad.abs().max()
    assert (logits.grad - double.grad).abs().max() < 1e-5 * largest


def rounded_to(logits, targets, options):
    packed = joined(RouterOptions(top_k=K).pack(), options.pack())
    return torch.ops.sonicmoe_cpp.round_tokens_to_forward(logits, None, targets, *packed)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rounding_to_given_rows(backend, monkeypatch):
    """The tokens that chose the expert first, each class by falling score."""
    monkeypatch.setenv("SONICMOE_BACKEND", backend)
    logits, up = torch.randn(T, E), RoundingOptions(tile=8, policy="up")
    packed = joined(RouterOptions(top_k=K).pack(), up.pack())
    right = torch.ops.sonicmoe_cpp.round_tokens_forward(logits, None, None, *packed)
    for ours, expected in zip(rounded_to(logits, right[4], up), right, strict=True):
        assert torch.equal(ours, expected)

    targets = torch.randint(0, 2 * T * K // E, (E,)).int()
    targets[0], targets[1] = 0, T
    tokens, experts, weights, ids, rows, before = rounded_to(logits, targets, up)
    assert torch.equal(rows, targets) and (rows < before).any() and (rows > before).any()
    scores, chose = logits.softmax(-1), torch.zeros(T, E).scatter(1, ids.long(), 1.0)
    for e in range(E):
        strongest = (scores[:, e] + 2 * chose[:, e]).argsort(descending=True)[: targets[e]]
        assert torch.equal(tokens[experts == e].long(), strongest.sort()[0])
    used = tokens >= 0
    expected = scores[tokens[used].long(), experts[used].long()]
    assert torch.allclose(weights[used], expected) and (weights[~used] == 0).all()


def test_rows_that_cannot_be_are_refused():
    options = RoundingOptions(tile=8, policy="down")
    for row, message in ((-1, "rows in 0..40, got -1 for"), (T + 1, "rows in 0..40, got 41 for")):
        with pytest.raises(RuntimeError, match=f"targets: expected {message} expert 1"):
            rounded_to(torch.randn(T, E), torch.tensor([0, row] + [0] * (E - 2)).int(), options)
    with pytest.raises(RuntimeError, match="targets: expected at most 120 rows in sum, got 480"):
        rounded_to(torch.randn(T, E), torch.full((E,), T).int(), options)


def test_rounding_seed_may_be_a_tensor():
    logits = torch.randn(T, E)

    def rounded(seed):
        return sm.round_tokens(logits, K, tile=8, policy="stochastic", seed=seed)[1]

    assert torch.equal(rounded(5), rounded(torch.tensor(5)))
    assert any(not torch.equal(rounded(5), rounded(seed)) for seed in range(6, 12))


@pytest.mark.parametrize("scoring", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
def test_losses(scoring):
    logits = torch.randn(T, E, requires_grad=True)
    ids, _ = sm.route(logits, K, scoring=scoring)
    rows = torch.bincount(ids.flatten(), minlength=E).int()
    loss = sm.load_balancing_loss(logits, rows, top_k=K, scoring=scoring)
    z_loss = sm.router_z_loss(logits)
    double = logits.detach().double().requires_grad_()
    expected = eager.load_balancing_loss(double, rows, K, scoring)
    expected_z = double.logsumexp(-1).square().mean()
    assert loss.shape == () and abs(loss - expected) < 1e-5 * expected
    assert abs(z_loss - expected_z) < 1e-5 * expected_z
    (3 * loss + z_loss).backward()
    (3 * expected + expected_z).backward()
    assert (logits.grad - double.grad).abs().max() < 1e-5 * double.grad.abs().max()


def test_rows_that_do_not_count_token_choice_are_refused():
    """As after rounding, where they would hide what the router chose."""
    logits = torch.randn(T, E)
    rows = sm.route(logits, K)[0].flatten().bincount(minlength=E).int()
    assert sm.load_balancing_loss(logits, rows, K) > 0
    for wrong in (rows // 8 * 8, 0 * rows, 2 * rows):
        message = f"rows_per_expert: expected counts of token choice, {T * K} in sum, got a sum"
        with pytest.raises(RuntimeError, match=message):
            sm.load_balancing_loss(logits, wrong, K)


def test_update_expert_bias():
    bias = torch.zeros(4)
    returned = sm.update_expert_bias_(bias, torch.tensor([4, 0, 2, 2], dtype=torch.int32), 0.5)
    assert returned is bias and torch.equal(bias, torch.tensor([-0.5, 0.5, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: sm.route(x, 0), "top_k"),
        (lambda x: sm.route(x, E + 1), "top_k"),
        (lambda x: sm.route(x, -1), "top_k"),
        (lambda x: sm.route(x, K, scoring="argmax"), "scoring: expected one of"),
        (
            lambda x: sm.route(x, K, scoring="topk_softmax", renormalize=False),
            "renormalize",
        ),
        (lambda x: sm.route(x, K, selection_bias=torch.zeros(E)), "selection_bias"),
        (lambda x: sm.route(x * float("nan"), K), "NaN|nan"),
        (lambda x: sm.round_tokens(x, K, tile=T + 1), "tile|num_tokens|tokens"),
        (
            lambda x: sm.round_tokens(x, K, tile=8, policy="sideways"),
            "policy: expected one of",
        ),
        (lambda x: sm.round_tokens(x, K, tile=8, seed=-1), "seed"),
    ],
)
def test_errors(call, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(torch.randn(T, E))
