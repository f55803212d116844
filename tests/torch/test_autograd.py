"""Autograd beyond one plain backward: right, or refused by name."""

import pytest
import sonicmoe_cpp as sm
import torch
from sonicmoe_cpp.functional import router_logits
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

T, D, N, E, K = 12, 6, 4, 5, 2
ops = torch.ops.sonicmoe_cpp


def experts():
    w1, w2 = torch.randn(E, 2 * N, D) / D**0.5, torch.randn(E, D, N) / N**0.5
    return w1, w2, torch.randint(0, E, (T, K)), torch.rand(T, K)


def functions():
    """Every differentiable function of x [T, D] or of logits [T, E]."""
    w1, w2, ids, weights = experts()
    offsets = torch.tensor([2, 5, 5, 9, T], dtype=torch.int32)
    rows = torch.tensor([4, 5, 6, 5, 4], dtype=torch.int32)
    router = torch.randn(E, D)
    sigmoid = {"scoring": "sigmoid_topk", "selection_bias": torch.randn(E)}
    rounding = {"router": "token_rounding", "tile": 2}
    of_x = {
        "moe": lambda x: sm.moe(x, w1, w2, ids, weights),
        "moe_sorted": lambda x: sm.moe_sorted(x, w1, w2, offsets),
        "moe_pairs": lambda x: sm.moe_pairs(x, w1, w2, ids[:, 0], ids[:, 1], weights[:, 0]),
        "router_logits": lambda x: router_logits(x, router),
        "moe_layer": lambda x: sm.moe_layer(x, router, w1, w2, K)[0],
        "moe_layer, rounded": lambda x: sm.moe_layer(x, router, w1, w2, K, **rounding)[0],
        "moe_layer, logits": lambda x: sm.moe_layer(x, router, w1, w2, K, **sigmoid)[1],
    }
    of_logits = {
        "route": lambda x: sm.route(x, K, **sigmoid)[1],
        "round_tokens": lambda x: sm.round_tokens(x, K, tile=2)[2],
        "load_balancing_loss": lambda x: sm.load_balancing_loss(x, rows, K),
        "router_z_loss": lambda x: sm.router_z_loss(x),
    }
    inputs = torch.randn(T, D), torch.randn(T, E)
    cases = {name: (f, inputs[0]) for name, f in of_x.items()}
    return cases | {name: (f, inputs[1]) for name, f in of_logits.items()}


NAMES = ["moe", "moe_sorted", "moe_pairs", "moe_layer", "moe_layer, rounded", "moe_layer, logits"]
NAMES += ["router_logits", "route", "round_tokens", "load_balancing_loss", "router_z_loss"]


def close(ours, right):
    assert right.abs().max() > 0 and (ours - right).abs().max() <= 1e-5 * right.abs().max()


# ------------------------------------------------------------------------------------ forward mode

REFUSED = "forward-mode differentiation \\(jvp\\) is not supported"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused(name, requires_grad):
    function, x = functions()[name]
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    x = x.requires_grad_(requires_grad)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match=REFUSED):
            function(dual)
        function(x.detach())  # no tangent, no refusal
    with pytest.raises(RuntimeError, match=REFUSED):  # through the backward operators
        torch.func.jvp(torch.func.grad(lambda v: function(v).sum()), (x,), (torch.ones_like(x),))


def test_forward_mode_through_any_argument_is_refused():
    w1, w2, ids, weights = experts()
    router = torch.randn(E, D)
    x, bias, rows = torch.randn(T, D), torch.zeros(E), torch.ones(E, dtype=torch.int32)
    calls = {
        "w1": (lambda v: sm.moe(x, v, w2, ids, weights), w1),
        "topk_weights": (lambda v: sm.moe(x, w1, w2, ids, v), weights),
        "router_weight": (lambda v: sm.moe_layer(x, v, w1, w2, K), router),
        "selection_bias": (lambda v: sm.update_expert_bias_(v, rows, 0.1), bias),
    }
    for call, value in calls.values():
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.func.jvp(call, (value,), (torch.ones_like(value),))
    module = with_buffers()
    with pytest.raises(RuntimeError, match=REFUSED), forward_ad.dual_level():
        module(forward_ad.make_dual(x, torch.ones_like(x)))


# -------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("name", NAMES)
def test_reverse_mode_of_torch_func(name):
    function, x = functions()[name]
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    seed = torch.randn(y.shape)
    (right,) = torch.autograd.grad(y, leaf, seed)
    close(torch.func.vjp(function, x)[1](seed)[0], right)
    close(torch.func.grad(lambda v: (function(v) * seed).sum())(x), right)
    jacobian = torch.func.jacrev(function)(x)
    close(torch.tensordot(seed, jacobian, seed.dim()), right)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(name):
    """Values and gradients of each sample."""
    function, x = functions()[name]
    batch = torch.randn(3, *x.shape)
    values = torch.func.vmap(function)(batch)
    gradients = torch.func.vmap(torch.func.grad(lambda v: function(v).square().sum()))(batch)
    for sample, value, gradient in zip(batch, values, gradients, strict=True):
        assert torch.equal(value, function(sample))
        leaf = sample.clone().requires_grad_()
        (right,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
        close(gradient, right)


def test_gradients_of_a_functional_module():
    module = sm.MoE(D, N, E, K, router="token_rounding", tile=2, expert_bias=True)
    x = torch.randn(2, 6, D)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(given):
        return torch.func.functional_call(module, given, (x,)).square().sum()

    ours = torch.func.grad(loss)(parameters)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        close(ours[name], parameter.grad)


def test_an_ensemble_by_vmap_has_gradients():
    """The batches of parameters require gradients, though vmap hides it."""
    modules = [sm.MoE(D, N, E, K) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(modules)
    x = torch.randn(T, D)

    def run(parameters):
        return torch.func.functional_call(modules[0], parameters, (x,))

    torch.func.vmap(run)(stacked).square().sum().backward()
    for index, module in enumerate(modules):
        right = gradients(module, x)
        for name, parameter in stacked.items():
            close(parameter.grad[index], right[name])


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_is_refused(name):
    function, x = functions()[name]
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        first.sum().backward()
    gradient = torch.func.grad(lambda v: function(v).square().sum())
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.func.grad(lambda v: gradient(v).sum())(x)


# ---------------------------------------------------------------------------------------- backward


def test_gradients_of_some_inputs_and_of_a_retained_graph():
    module = sm.MoE(D, N, E, K, router_bias=True)
    x = torch.randn(T, D, requires_grad=True)
    tensors = [x, *module.parameters()]
    loss = module(x).square().sum()
    whole = torch.autograd.grad(loss, tensors, retain_graph=True)
    for tensor, right in zip(tensors, whole, strict=True):
        (ours,) = torch.autograd.grad(loss, tensor, retain_graph=True)
        assert right.abs().max() > 0 and torch.equal(ours, right)
    loss.backward(retain_graph=True)
    loss.backward()
    for tensor, right in zip(tensors, whole, strict=True):
        assert torch.equal(tensor.grad, 2 * right)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_hooks_on_saved_tensors_and_anomaly_mode_change_nothing():
    module = sm.MoE(D, N, E, K, expert_bias=True)
    x = torch.randn(T, D, requires_grad=True)
    (right,) = torch.autograd.grad(module(x).square().sum(), x)
    with torch.autograd.graph.save_on_cpu(), torch.autograd.detect_anomaly(check_nan=True):
        (ours,) = torch.autograd.grad(module(x).square().sum(), x)
    assert torch.equal(ours, right)


@pytest.mark.parametrize("size", [(3, 8, 6), (2, 1024, 512)])  # small; of 4 MiB and more
@pytest.mark.parametrize("view", ["one expert for all", "rows that overlap", "expanded"])
def test_gradients_of_weights_that_share_memory(size, view):
    """As those of the same values in memory of their own."""
    count, rows, width = size
    views = {
        "one expert for all": lambda: torch.randn(1, rows, width).expand(size),
        "rows that overlap": lambda: torch.randn(rows * width).as_strided(size, (1, width // 2, 1)),
        "expanded": lambda: torch.randn(count, 1, width).expand(size),
    }
    shared = views[view]()
    x, w2 = torch.randn(T, width), torch.randn(count, width, rows // 2)
    ids, weights = torch.randint(0, count, (T, 1)), torch.ones(T, 1)

    def gradient(w1):
        w1 = w1.detach().requires_grad_()
        sm.moe(x, w1, w2, ids, weights).square().sum().backward()
        return w1.grad

    close(gradient(shared), gradient(shared.clone(memory_format=torch.contiguous_format)))


# --------------------------------------------------------------------------------------- main_grad


def with_buffers(value=0.0, **options):
    module = sm.MoE(D, N, E, K, main_grad=True, **options)
    for parameter in module.parameters():
        parameter.main_grad = torch.full(parameter.shape, value)
    return module


def twin_of(module, **options):
    twin = sm.MoE(D, N, E, K, **options)
    twin.load_state_dict(module.state_dict())
    return twin


def holds(module, expected):
    """Each main_grad is `expected(name)`, a gradient or zero."""
    for name, parameter in module.named_parameters():
        right = expected(name)
        error = (parameter.main_grad - right).abs().max()
        assert error <= 1e-5 * (parameter.main_grad.abs().max() + 1e-30), name
        assert parameter.grad is None


def gradients(module, x):
    module.zero_grad()
    module(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def test_autograd_grad_leaves_main_grad_alone():
    module = with_buffers(router_bias=True)
    x = torch.randn(T, D, requires_grad=True)
    twin = twin_of(module, router_bias=True)
    right = gradients(twin, x)
    right_x = x.grad.clone()
    loss = module(x).square().sum()
    for inputs in (
        [x],
        [x, module.experts.w2],
        [module.router.weight, module.experts.w1],
        [module.router.bias],
    ):
        found = torch.autograd.grad(loss, inputs, retain_graph=True)
        for tensor, ours in zip(inputs, found, strict=True):
            name = next((n for n, p in module.named_parameters() if p is tensor), None)
            close(ours, right_x if name is None else right[name])
        holds(module, lambda name: 0)
    loss.backward(retain_graph=True)
    holds(module, lambda name: right[name])
    loss.backward()
    holds(module, lambda name: 2 * right[name])


def test_backward_for_some_inputs_accumulates_into_those():
    module = with_buffers()
    x = torch.randn(T, D, requires_grad=True)
    right = gradients(twin_of(module), x)
    x.grad = None
    module(x).square().sum().backward(inputs=[module.experts.w1])
    holds(module, lambda name: right[name] if name == "experts.w1" else 0)
    assert x.grad is None


def test_frozen_parameters_get_nothing():
    module = with_buffers()
    module.experts.w1.requires_grad_(False)
    right = gradients(twin_of(module), torch.ones(T, D))
    module(torch.ones(T, D)).square().sum().backward()
    holds(module, lambda name: 0 if name == "experts.w1" else right[name])


def test_a_layer_used_twice_and_tied_weights_accumulate_both():
    first, second = with_buffers(), with_buffers()
    second.experts.w1 = first.experts.w1
    x = torch.randn(T, D)
    twins = twin_of(first), twin_of(second)
    twins[1].experts.w1 = twins[0].experts.w1

    def loss(a, b):
        return b(a(a(x))).square().sum()

    loss(*twins).backward()
    loss(first, second).backward()
    for module, twin in zip((first, second), twins, strict=True):
        right = {name: p.grad for name, p in twin.named_parameters()}
        holds(module, right.__getitem__)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_main_grad_under_checkpointing(use_reentrant):
    module = with_buffers(router="token_rounding", tile=4, policy="stochastic")
    twin = twin_of(module, router="token_rounding", tile=4, policy="stochastic")
    x = torch.randn(T, D, requires_grad=True)
    torch.manual_seed(3)
    right = gradients(twin, x)
    torch.manual_seed(3)
    checkpoint(module, x, use_reentrant=use_reentrant).square().sum().backward()
    holds(module, lambda name: right[name])


def test_a_buffer_may_be_overwritten():
    module = with_buffers(value=7.0)
    x = torch.randn(T, D)
    right = gradients(twin_of(module), x)
    module.experts.w1.overwrite_main_grad = True
    module(x).square().sum().backward()
    holds(module, lambda name: right[name] + (0 if name == "experts.w1" else 7))


@pytest.mark.parametrize(
    "buffer",
    [
        None, torch.zeros(E, 2 * N, D, dtype=torch.bfloat16), torch.zeros(E, 2 * N),
        torch.zeros(E, 2 * N, D, device="meta"), "zeros",
    ],
)  # fmt: skip
def test_a_wrong_buffer_is_refused_before_any_is_written(buffer):
    module = with_buffers()
    module.experts.w2.overwrite_main_grad = True
    module.experts.w2.main_grad.fill_(5)
    module.experts.w1.main_grad = buffer
    with pytest.raises(RuntimeError, match="main_grad: expected a float32 buffer .+, got"):
        module(torch.randn(T, D)).square().sum().backward()
    assert (module.experts.w2.main_grad == 5).all() and (module.router.weight.main_grad == 0).all()


def test_main_grad_where_it_cannot_work_is_refused():
    module, x = with_buffers(), torch.randn(T, D)
    with (
        pytest.raises(ValueError, match="main_grad: not supported under autocast"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        module(x)
    with pytest.raises(ValueError, match="main_grad: not supported under torch.func"):
        torch.func.grad(lambda v: module(v).sum())(x)
    right = gradients(twin_of(module), x)
    torch._dynamo.reset()
    torch.compile(module, backend="eager")(x).square().sum().backward()  # a graph break
    holds(module, lambda name: right[name])
    torch._dynamo.reset()
    with pytest.raises(Exception, match="main_grad: not supported under torch.compile"):
        torch.compile(module, backend="eager", fullgraph=True)(x)


# ------------------------------------------------------------------------------- in-place operators


def update(bias):
    sm.update_expert_bias_(bias, torch.tensor([3, 0, 1, 2, 4], dtype=torch.int32), 0.5)


def test_autograd_sees_the_bias_change():
    bias, scale = torch.zeros(E), torch.ones(E, requires_grad=True)
    y = (scale * bias).sum()  # saves the bias
    before = bias._version
    update(bias)
    assert bias._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_bias_may_change_between_forward_and_backward_of_the_layer():
    """It only selects, and has selected."""
    module = sm.MoE(D, N, E, K, scoring="sigmoid_topk", selection_bias=True)
    x = torch.randn(T, D, requires_grad=True)
    (right,) = torch.autograd.grad(module(x).square().sum(), x)
    y = module(x)
    update(module.router.selection_bias)
    (ours,) = torch.autograd.grad(y.square().sum(), x)
    assert module.router.selection_bias.abs().max() > 0 and torch.equal(ours, right)


def test_a_bias_that_requires_grad_changes_under_no_grad_only():
    for bias in (torch.zeros(E, requires_grad=True), torch.zeros(E, requires_grad=True) * 1):
        with pytest.raises(RuntimeError, match="bias: expected a tensor without requires_grad"):
            update(bias)
        assert (bias == 0).all()
        with torch.no_grad():
            update(bias)
        assert bias.abs().max() == 0.5
    with torch.inference_mode():
        bias = torch.zeros(E)
        update(bias)
    assert bias.abs().max() == 0.5
