"""The operators on a Hopper GPU: values, streams, graphs, compilation, memory.

Skipped where torch sees no GPU or the build has no CUDA backend; `make gpu-test` runs them.
"""

import copy

import eager
import pytest
import sonicmoe_cpp as sm
import torch
from parts import layer_in_parts
from sonicmoe_cpp._library import FORM_PAIRS, FORM_TOP_K
from sonicmoe_cpp.options import ExpertOptions, LayerOptions, RoutedExpertOptions, RouterOptions
from torch.library import opcheck

CUDA = next((b for b in sm.backends() if b.name == "cuda"), None)
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or CUDA is None or not CUDA.available,
    reason=f"no usable GPU: {CUDA.reason if CUDA else 'the build has no CUDA backend'}",
)

T, D, N, E, K = 256, 128, 64, 8, 2
BF16 = torch.bfloat16
ROUTERS = ("topk", "token_rounding")
POLICIES = ("nearest", "up", "down", "stochastic", "balanced", "nearest_score")


def layer(**options):
    return sm.MoE(D, N, E, K, device="cuda", dtype=BF16, **{"tile": 64} | options)


def tokens(count=T, generator=None):
    return torch.randn(count, D, device="cuda", dtype=BF16, generator=generator)


def gradients(module, x, grad, grad_logits=None):
    """y, logits and the gradients of x and of every parameter, in one forward and backward."""
    x = x.detach().requires_grad_()
    y, logits, rows = module(x, return_router=True)
    outputs, grads = [y], [grad]
    if grad_logits is not None:
        outputs, grads = [y, logits], [grad, grad_logits]
    return [y, logits, rows, *torch.autograd.grad(outputs, [x, *module.parameters()], grads)]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.abs().max() > 0 and torch.equal(a, b)


# ------------------------------------------------------------------------------------------ values


def rms(value):
    return value.double().square().mean().sqrt()


def reference_experts(x, w1, w2, ids, weights, b1, b2, activation, layout):
    return eager.top_k(
        x, w1, w2, ids, weights, b1=b1, b2=b2, activation=activation, gate_up_layout=layout
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamped", "relu_squared"])
def test_no_less_accurate_than_a_plain_bf16_layer(activation, layout, transposed):
    """Against float64: at most twice the error of the same layer written in bfloat16 torch."""
    g = 1 if activation == "relu_squared" else 2
    leaves = [
        torch.randn(T, D),
        torch.randn(E, g * N, D) / D**0.5,
        torch.randn(E, D, N) / N**0.5,
        torch.randn(T, K).softmax(-1),
        torch.randn(E, g * N),
        torch.randn(E, D),
    ]
    ids = torch.rand(T, E).topk(K, -1)[1].cuda()
    leaves = [t.cuda().to(BF16) for t in leaves]
    grad = tokens()

    def run(function, dtype):
        x, w1, w2, s, b1, b2 = (t.to(dtype).requires_grad_() for t in leaves)
        if transposed:
            w1, w2 = (w.mT.contiguous().mT.detach().requires_grad_() for w in (w1, w2))
        y = function(x, w1, w2, ids, s, b1, b2, activation, layout)
        return [y, *torch.autograd.grad(y, (x, w1, w2, s, b1, b2), grad.to(dtype))]

    def ours(x, w1, w2, ids, s, b1, b2, activation, layout):
        return sm.moe(x, w1, w2, ids, s, b1, b2, activation=activation, gate_up_layout=layout)

    with torch.device("cuda"):
        exact = run(reference_experts, torch.float64)
        plain = run(reference_experts, BF16)
    for a, b, c in zip(run(ours, BF16), plain, exact, strict=True):
        assert a.dtype == BF16 and a.shape == c.shape
        limit = 2 * rms(b.double() - c) + 2**-9 * rms(c)
        assert rms(a.double() - c) <= limit < rms(c)


@pytest.mark.parametrize("scoring", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
@pytest.mark.parametrize("router", ROUTERS)
def test_one_node_equals_its_parts(scoring, router):
    module = layer(scoring=scoring, router=router, expert_bias=True, router_bias=True)
    x, grad = tokens(), tokens()
    grad_logits = torch.randn(T, E, device="cuda") / 10
    y, logits, chosen, *ours = gradients(module, x, grad, grad_logits)
    rows = module.last_rows_per_expert
    assert chosen.sum() == T * K  # those of token choice, also where rows are rounded

    x = x.detach().requires_grad_()
    router_bias = module.router.bias.float()
    parts = (x.float() @ module.router.weight.float().T) + router_bias
    parts = logits.detach() + (parts - parts.detach())  # equal values: equal routing
    expected, counts = layer_in_parts(module, x, parts)
    theirs = torch.autograd.grad([expected, parts], [x, *module.parameters()], [grad, grad_logits])
    assert torch.equal(rows, counts)
    assert torch.equal(y, expected)
    for a, b in zip(ours, theirs, strict=True):
        assert rms(a.double() - b.double()) < 2**-7 * rms(b)


@pytest.mark.parametrize("policy", POLICIES)
def test_routing_equals_the_cpus(policy):
    """Equal logits give equal ids, counts and rounded pairs, and close weights and gradients."""
    logits = torch.randn(T, E)
    ids, weights = sm.route(logits, K)
    ids_gpu, weights_gpu = sm.route(logits.cuda(), K)
    assert torch.equal(ids, ids_gpu.cpu())
    torch.testing.assert_close(weights, weights_gpu.cpu(), rtol=1e-6, atol=1e-7)

    def rounded(device):
        given = logits.detach().to(device, copy=True).requires_grad_()
        *pairs, s = sm.round_tokens(given, K, tile=16, policy=policy, seed=5)
        (grad,) = torch.autograd.grad((s * torch.arange(s.numel(), device=device)).sum(), given)
        return *pairs, s.detach().cpu(), grad.cpu()

    tokens_cpu, experts_cpu, s, grad = rounded("cpu")
    tokens_gpu, experts_gpu, s_gpu, grad_gpu = rounded("cuda")
    assert torch.equal(tokens_cpu, tokens_gpu.cpu()) and torch.equal(experts_cpu, experts_gpu.cpu())
    torch.testing.assert_close(s, s_gpu, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, grad_gpu, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def test_losses_equal_the_cpus():
    logits = torch.randn(T, E)
    rows = sm.route(logits, K)[0].flatten().bincount(minlength=E).int()
    for loss in (lambda v, r: sm.load_balancing_loss(v, r, K), lambda v, r: sm.router_z_loss(v)):
        results = []
        for device in ("cpu", "cuda"):
            given = logits.detach().to(device, copy=True).requires_grad_()
            value = loss(given, rows.to(device))
            value.backward()
            results.append((value.detach().cpu(), given.grad.cpu()))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)


def test_main_grad_accumulates_in_float32():
    module = layer(main_grad=True)
    plain = layer()
    plain.load_state_dict(module.state_dict())
    for parameter in module.parameters():
        parameter.main_grad = torch.full(parameter.shape, 256.0, device="cuda")
    x, grad = tokens(), tokens()
    for _ in range(2):
        module(x).backward(grad)
    plain(x).backward(grad)
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert ours.grad is None and theirs.grad.abs().max() > 0
        error = (ours.main_grad - 256 - 2 * theirs.grad.float()).abs().max()
        assert error <= 2**-7 * theirs.grad.float().abs().max()


@pytest.mark.parametrize("router", ROUTERS)
def test_sums_in_any_order_differ_by_roundings_alone(router):
    options = {"top_k": 6, "router": router, "tile": 64, "router_bias": True, "device": "cuda"}
    exact, free = (
        sm.MoE(D, N, 16, dtype=BF16, deterministic=deterministic, **options)
        for deterministic in (True, False)
    )
    free.load_state_dict(exact.state_dict())
    x, grad, grad_logits = tokens(1024), tokens(1024), torch.randn(1024, 16, device="cuda") / 64
    expected = gradients(exact, x, grad, grad_logits)
    ours = gradients(free, x, grad, grad_logits)
    y, logits, rows, grad_x, *parameters = range(len(ours))
    assert_equal([ours[i] for i in (logits, rows)], [expected[i] for i in (logits, rows)])
    assert_equal([ours[i] for i in parameters], [expected[i] for i in parameters])
    for i in (y, grad_x):
        error = rms(ours[i] - expected[i]) / rms(expected[i])
        assert 0 < error < 1e-2, f"output {i}: relative error {error:.1e}"


def test_sums_in_any_order_need_no_rows_in_memory():
    x, w1, w2 = tokens(4096), layer().experts.w1, layer().experts.w2
    ids = torch.randint(0, E, (4096, K), dtype=torch.int32, device="cuda")
    s = torch.rand(4096, K, device="cuda")

    def peak(deterministic):
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            sm.moe(x, w1, w2, ids, s, deterministic=deterministic)
        return torch.cuda.max_memory_allocated()

    rows = 4096 * K * D * 2
    assert peak(True) - peak(False) == pytest.approx(rows, rel=0.01)


def test_unsupported_calls_name_what_is_supported():
    x, w1, w2 = tokens(), layer().experts.w1, layer().experts.w2
    ids, s = torch.zeros(T, K, dtype=torch.int32, device="cuda"), torch.ones(T, K, device="cuda")
    with pytest.raises(RuntimeError, match="bfloat16"):
        sm.moe(x.float(), w1.float(), w2.float(), ids, s)
    with pytest.raises(RuntimeError, match="multiple of 8"):
        sm.moe(x[:, :12], w1[:, :, :12].contiguous(), w2[:, :12].contiguous(), ids, s)
    for option in ({"workspace_limit": 1}, {"workspace_limit": 4096}):
        with pytest.raises(RuntimeError, match="workspace_limit: expected at least"):
            sm.moe(x, w1, w2, ids, s, **option)


# ------------------------------------------------------------------------- streams, graphs, compile


def losses(logits, rows):
    return sm.load_balancing_loss(logits, rows, K) + sm.router_z_loss(logits)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("main_grad", [False, True])
def test_a_training_step_never_synchronises(router, main_grad):
    module = layer(router=router, policy="stochastic", main_grad=main_grad, expert_bias=True)
    if main_grad:
        for parameter in module.parameters():
            parameter.main_grad = torch.zeros(parameter.shape, device="cuda")
    x, grad = tokens().requires_grad_(), tokens()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, logits, rows = module(x, return_router=True)
        torch.autograd.backward([y, losses(logits, rows)], [grad, None])
        with torch.no_grad():
            module(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad.abs().max() > 0


def test_work_is_put_on_the_current_stream():
    """The input is written late on a side stream: any other stream would read it too early."""
    module, x, grad = layer(), tokens(), tokens()
    expected = gradients(module, x, grad)
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        late.copy_(x)
        ours = gradients(module, late, grad)
    side.synchronize()
    assert_equal(ours, expected)


def test_two_streams_at_once():
    modules, streams = [layer(), layer()], [torch.cuda.Stream(), torch.cuda.Stream()]
    inputs = [(tokens(2048), tokens(2048)) for _ in modules]
    expected = [gradients(m, *given) for m, given in zip(modules, inputs, strict=True)]
    torch.cuda.synchronize()
    for _ in range(20):
        seen = []
        for module, stream, given in zip(modules, streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                seen.append(gradients(module, *given))
        torch.cuda.synchronize()
        for ours, theirs in zip(seen, expected, strict=True):
            assert_equal(ours, theirs)


def captured_step(module, x, grad):
    """A graph of forward and backward, and the tensors it writes."""
    warmup = torch.cuda.Stream()
    warmup.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup):
        gradients(module, x, grad)
    torch.cuda.current_stream().wait_stream(warmup)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = gradients(module, x, grad)
    return graph, results


@pytest.mark.parametrize("policy", ["topk", *POLICIES])
def test_one_graph_replays_with_other_tokens_and_another_routing(policy):
    """A captured forward and backward: every replay equals eager on its tokens."""
    rounds = policy != "topk"
    options = {"router": "token_rounding", "policy": policy} if rounds else {}
    module, x, grad = layer(**options), tokens(), tokens()
    twin = copy.deepcopy(module)
    graph, results = captured_step(module, x, grad)
    seen = set()
    for step in range(4):
        x.copy_(tokens() + step)
        grad.copy_(tokens())
        graph.replay()
        torch.cuda.synchronize()
        seen.add(tuple(results[2].tolist()))
        if policy == "stochastic":
            expected = with_seed(twin, module.rounding_seed, x, grad)
        else:
            expected = gradients(twin, x, grad)
        assert_equal(results, expected)
    assert len(seen) > 1, "the routing never changed"


def test_a_graph_of_sums_in_any_order():
    module, x, grad = layer(deterministic=False), tokens(), tokens()
    graph, results = captured_step(module, x, grad)
    for step in range(3):
        x.copy_(tokens() + step)
        graph.replay()
        torch.cuda.synchronize()
        expected = gradients(module, x, grad)
        dx, same = results.pop(3), expected.pop(3)  # three terms; y has two, in either order
        assert_equal(results, expected)
        assert rms(dx - same) < 1e-2 * rms(same)
        results.insert(3, dx)


def with_seed(module, seed, x, grad):
    """The layer's results for one given rounding seed."""
    x = x.detach().requires_grad_()
    y, logits, rows = sm.moe_layer(
        x, module.router.weight, module.experts.w1, module.experts.w2, K,
        router="token_rounding", policy="stochastic", tile=64, seed=seed,
    )  # fmt: skip
    return [y, logits, rows, *torch.autograd.grad(y, [x, *module.parameters()], grad)]


def test_the_seed_of_stochastic_rounding_advances_between_replays():
    module = layer(router="token_rounding", policy="stochastic")
    graph, _ = captured_step(module, tokens(), tokens())
    seeds, counts = set(), set()
    for _ in range(12):
        graph.replay()
        seeds.add(int(module.rounding_seed))
        counts.add(tuple(module.last_rows_per_expert.tolist()))
    assert len(seeds) == 12 and len(counts) > 1


@pytest.mark.parametrize("router", ROUTERS)
def test_compile_fullgraph_with_a_changing_number_of_tokens(router):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = layer(router=router)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for count in (256, 320, 192, 512):
        x, grad = tokens(count), tokens(count)
        assert_equal(gradients(compiled, x, grad), gradients(module, x, grad))
    assert 1 <= counter.frame_count <= 2


def test_compile_with_inductor():
    pytest.importorskip("triton")
    module = layer()
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: module(v.tanh()) * 2, fullgraph=True)
    x = tokens()
    torch.testing.assert_close(compiled(x), module(x.tanh()) * 2, rtol=2e-2, atol=1e-3)


def test_opcheck_of_the_layer():
    ops = torch.ops.sonicmoe_cpp
    x, wr = tokens(), torch.randn(E, D, device="cuda", dtype=BF16)
    w1 = torch.randn(E, 2 * N, D, device="cuda", dtype=BF16)
    w2 = torch.randn(E, D, N, device="cuda", dtype=BF16)
    given = [t.requires_grad_() for t in (x, wr, w1, w2)]
    x, wr, w1, w2 = given
    options = LayerOptions(ExpertOptions(), RouterOptions(top_k=K, renormalize=True), None).pack()
    opcheck(ops.moe_layer_forward, (x, wr, None, w1, None, w2, None, None, None, *options, True))


@pytest.mark.parametrize("form", [FORM_TOP_K, FORM_PAIRS])
def test_fakes_of_a_bounded_backward_in_steps(form):
    """row_lists has a list of tokens of top-K routing alone."""
    ops = torch.ops.sonicmoe_cpp
    x = tokens()
    w1 = torch.randn(E, 2 * N, D, device="cuda", dtype=BF16)
    w2 = torch.randn(E, D, N, device="cuda", dtype=BF16)
    ids = torch.randint(0, E, (T, K), device="cuda")
    weights, token_ids = torch.rand(T, K, device="cuda"), None
    if form == FORM_PAIRS:
        ids, weights = ids.flatten(), weights.flatten()
        token_ids = torch.arange(T, device="cuda").repeat_interleave(K)
    options = RoutedExpertOptions(max_rows=T * K // 2).pack()
    given = (x, w1, None, w2, None, form, ids, token_ids, weights)
    _, h, metadata, _ = ops.moe_forward(*given, *options, True)
    hidden = (tokens(), *given, [h, metadata], *options, True)
    opcheck(ops.moe_backward_hidden, hidden, test_utils="test_faketensor")


def test_autocast_and_checkpointing():
    module = sm.MoE(D, N, E, K, router="token_rounding", tile=64, policy="stochastic").cuda()
    x = torch.randn(T, D, device="cuda")

    def step(wrap):
        torch.manual_seed(3)
        module.zero_grad()
        given = x.clone().requires_grad_()
        with torch.autocast("cuda", dtype=BF16):
            if wrap:
                y = torch.utils.checkpoint.checkpoint(module, given, use_reentrant=False)
            else:
                y = module(given)
        assert y.dtype == BF16
        y.float().square().sum().backward()
        return [y, given.grad, *(p.grad for p in module.parameters())]

    assert_equal(step(True), step(False))


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("router", ROUTERS)
def test_kept_memory_is_h_metadata_and_output(router):
    """What the allocator holds after forward: y, the logits, H, ids, weights and row lists."""
    count, d, n, experts, top_k = 4096, 512, 256, 32, 4
    module = sm.MoE(d, n, experts, top_k, router=router, tile=128, device="cuda", dtype=BF16)
    x = torch.randn(count, d, device="cuda", dtype=BF16).requires_grad_()
    module(x).sum().backward()
    module.last_rows_per_expert = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y, logits, _ = module(x, return_router=True)
    kept = torch.cuda.memory_allocated() - before
    pairs = count * top_k + (experts * 64 if router == "token_rounding" else 0)
    most = 4 * count * experts + 2 * count * d  # logits, output
    most += pairs * (2 * 2 * n + 32) + 4 * (experts + count)  # H, metadata
    least = pairs * 2 * 2 * n + 2 * count * d
    assert least <= kept <= most + 12 * 512, "512: the allocator's granularity, per tensor"
    assert logits.requires_grad and y.requires_grad


@pytest.mark.parametrize("way", ["eager", "kept", "checkpoint", "compiled"])
def test_the_most_in_backward_is_without_h(way):
    """Moments of a backward: dH and A' beside H; A' and dW2; dX~ without dW1; dW1 at last."""
    count, d, n, experts, top_k = 8192, 1024, 256, 32, 8
    module = sm.MoE(d, n, experts, top_k, device="cuda", dtype=BF16)
    x = torch.randn(count, d, device="cuda", dtype=BF16).requires_grad_()
    leaves, grad = [x, *module.parameters()], torch.randn_like(x)
    pairs = count * top_k
    h, a, wide = 2 * pairs * 2 * n, 2 * pairs * n, 2 * pairs * d
    dx, dw1, dw2 = 2 * count * d, 2 * experts * 2 * n * d, 2 * experts * n * d
    call = {
        "eager": module,
        "kept": module,
        "checkpoint": lambda v: torch.utils.checkpoint.checkpoint(module, v, use_reentrant=False),
        "compiled": torch.compile(module) if way == "compiled" else None,
    }[way]
    for _ in range(2):  # the second meets warm caches
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = call(x)
        kept = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        grads = torch.autograd.grad(y, leaves, grad, retain_graph=way == "kept")
        peak = torch.cuda.max_memory_allocated() - before
        del y, grads
    if way == "checkpoint":  # recomputed in backward: H, and a y and the logits more
        kept += h
    gone = 0 if way == "kept" else h
    moments = [kept + h + a, kept - gone + h + a + dw2, kept - gone + h + wide + dx + dw2]
    moments.append(kept - gone + h + dx + dw2 + dw1)
    slack = 2**24  # the router's parts, row lists
    slack += {"checkpoint": 2 * dx, "compiled": a}.get(way, 0)  # inductor orders what is left
    assert max(moments) <= peak <= max(moments) + slack
    one_call = kept + h + wide + dx + dw1 + dw2
    assert max(moments) + slack < one_call or way == "kept"


@pytest.mark.parametrize("compiled", [False, True])
def test_out_of_memory_is_torchs_error_or_says_so(compiled):
    """H alone takes 64 MiB of the 32 that are left. A compiled graph cannot raise torch's class."""
    count, d, n = 2**16, 64, 256
    module = sm.MoE(d, n, 4, 1, device="cuda", dtype=BF16)
    x = torch.randn(count, d, device="cuda", dtype=BF16).requires_grad_()
    call = torch.compile(module) if compiled else module
    call(x[:128])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + 2**25
    expected = RuntimeError if compiled else torch.OutOfMemoryError
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with pytest.raises(expected, match=r"CUDA out of memory\. sonicmoe_cpp could not") as error:
            call(x)
        assert isinstance(error.value, torch.OutOfMemoryError) is not compiled
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert call(x).isfinite().all()
