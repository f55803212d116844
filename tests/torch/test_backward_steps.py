"""A backward by three operators: the gradients of one, and H goes after the first."""

import copy
import shutil

import pytest
import sonicmoe_cpp as sm
import torch
from sonicmoe_cpp import _library, _moe, _moe_layer
from test_workspace_limit import traced
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

T, D, N, E, K = 48, 24, 16, 5, 2
LIMIT = 1 << 27  # the least on a GPU is 70 MiB
NEVER = 1 << 60


def steps_from(monkeypatch, elements):
    """From how many bytes of H on backward is in steps."""
    monkeypatch.setattr(_library, "STEPS_FROM_BYTES", elements)


def parameters(dtype=torch.float32):
    shapes = {"w1": (E, 2 * N, D), "b1": (E, 2 * N), "w2": (E, D, N), "b2": (E, D)}
    return {k: torch.randn(s).mul(0.3).to(dtype).requires_grad_() for k, s in shapes.items()}


def transposed(given):
    """w1 as a view of [E, D, 2N], as gpt-oss stores it."""
    w1 = given["w1"].detach().transpose(1, 2).contiguous().requires_grad_()
    return given | {"w1": w1.transpose(1, 2)}, w1


def router_weight(dtype=torch.float32):
    return torch.randn(E, D).to(dtype).requires_grad_()


def moe(x, given, leaves):
    ids = torch.arange(T * K).view(T, K) % (E + 1)  # E: a dropped slot
    weights = torch.linspace(0.1, 1, T * K).view(T, K).requires_grad_()
    leaves.append(weights)
    return sm.moe(x, given.pop("w1"), given.pop("w2"), ids, weights, **given)


def moe_sorted(x, given, leaves):
    ends = torch.tensor([7, 7, 20, 40, T - 3], dtype=torch.int32)
    return sm.moe_sorted(x, given.pop("w1"), given.pop("w2"), ends, **given)


def moe_pairs(x, given, leaves):
    tokens, ids = torch.arange(70) * 7 % T, torch.arange(70) * 3 % E
    weights = torch.linspace(0.1, 1, 70).to(x.dtype).requires_grad_()
    leaves.append(weights)
    return sm.moe_pairs(x, given.pop("w1"), given.pop("w2"), tokens, ids, weights, **given)


def layer(x, given, leaves, **options):
    leaves.append(router_weight(x.dtype))
    y, logits, rows = sm.moe_layer(
        x, leaves[-1], given.pop("w1"), given.pop("w2"), K, **given, **options
    )
    return y, sm.load_balancing_loss(logits, rows, K)


def rounded(x, given, leaves):
    return layer(x, given, leaves, router="token_rounding", tile=4)


CALLS = {f.__name__: f for f in (moe, moe_sorted, moe_pairs, layer, rounded)}


def gradients(call, dtype=torch.float32, limit=None, transpose=False):
    """Of every input, from fixed values."""
    torch.manual_seed(1)
    x, given = torch.randn(T, D).to(dtype).requires_grad_(), parameters(dtype)
    leaves = [x, *given.values()]
    if transpose:
        given, leaves[1] = transposed(given)
    outputs = call(x, {**given, "workspace_limit": limit}, leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn(o.shape).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, leaves, grads)


def assert_equal(ours, right):
    for a, b in zip(ours, right, strict=True):
        assert b.abs().max() > 0 and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, LIMIT])
def test_steps_give_the_bits_of_one_call(name, dtype, limit, monkeypatch):
    for transpose in (False, True):
        steps_from(monkeypatch, NEVER)
        right = gradients(CALLS[name], dtype, limit, transpose)
        steps_from(monkeypatch, 0)
        assert_equal(gradients(CALLS[name], dtype, limit, transpose), right)


@pytest.mark.parametrize("frozen", ["experts.w1", "experts.w2", "router.weight", "experts.b2", "x"])
def test_steps_leave_out_what_is_frozen(frozen, monkeypatch):
    module = sm.MoE(D, N, E, K, expert_bias=True)
    leaves = dict(module.named_parameters()) | {"x": torch.randn(T, D, requires_grad=True)}
    leaves.pop(frozen).requires_grad_(False)
    x = leaves.get("x", torch.randn(T, D))
    results = []
    for elements in (NEVER, 0):
        steps_from(monkeypatch, elements)
        results.append(torch.autograd.grad(module(x).square().sum(), leaves.values()))
    assert_equal(results[1], results[0])


def test_main_grads_are_added_to_in_steps(monkeypatch):
    module = sm.MoE(D, N, E, K, expert_bias=True, router_bias=True, main_grad=True)
    x = torch.randn(T, D)
    results = []
    for elements in (NEVER, 0):
        steps_from(monkeypatch, elements)
        twin = copy.deepcopy(module)
        for parameter in twin.parameters():
            parameter.main_grad = torch.ones(parameter.shape)
        twin(x.clone().requires_grad_()).square().sum().backward()
        results.append([p.main_grad for p in twin.parameters()])
    assert_equal(results[1], results[0])
    assert all((grad - 1).abs().max() > 0 for grad in results[0])


# ------------------------------------------------------------------------------------ H and A' go


class Watch:
    """Which of H and A' lives when an operator starts: {operator: names}."""

    def __init__(self, monkeypatch):
        self.alive = {}
        self._storages = {}
        for module in (_moe, _moe_layer):
            monkeypatch.setattr(module, "run", self.run)

    def run(self, operator, *arguments):
        name = operator.__name__.rpartition("_")[2]
        if name == "hidden":
            saved = next(value for value in arguments if isinstance(value, list))
            # The largest of floats: H, rows of both gate and up.
            h = max((t for t in saved if t.dtype == torch.float32), key=torch.Tensor.numel)
            self._storages["h"] = StorageWeakRef(h.untyped_storage())
            del saved, h
        self.alive[name] = {k for k, ref in self._storages.items() if not ref.expired()}
        results = operator(*arguments)
        if name == "hidden":
            self._storages["a"] = StorageWeakRef(results[1].untyped_storage())
        return results


@pytest.fixture
def watch(monkeypatch):
    steps_from(monkeypatch, 0)
    return Watch(monkeypatch)


def step(module, x, forward=None):
    """The parameters' gradients."""
    module.zero_grad()
    (forward or module)(x).square().sum().backward()
    return [p.grad.clone() for p in module.parameters()]


GONE = {"hidden": {"h"}, "down": {"a"}, "up": set()}
KEPT = {"hidden": {"h"}, "down": {"h", "a"}, "up": {"h"}}


@pytest.mark.parametrize("name", CALLS)
def test_h_goes_after_the_first_operator(name, watch):
    gradients(CALLS[name])
    assert watch.alive == GONE


@pytest.mark.parametrize("main_grad", [False, True])
def test_h_stays_where_the_graph_does(main_grad, watch):
    module, x = sm.MoE(D, N, E, K, main_grad=main_grad), torch.randn(T, D, requires_grad=True)
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
    y = module(x)
    first = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert watch.alive == KEPT
    second = torch.autograd.grad(y, x, torch.ones_like(y))
    assert_equal(second, first)
    assert watch.alive == GONE
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x, torch.ones_like(y))


@pytest.mark.parametrize("reentrant", [False, True])
def test_h_goes_under_checkpointing(reentrant, watch):
    module, x = sm.MoE(D, N, E, K), torch.randn(T, D, requires_grad=True)
    right = step(module, x)
    watch.alive.clear()
    ours = step(module, x, lambda v: checkpoint(module, v, use_reentrant=reentrant))
    assert watch.alive == GONE
    assert_equal(ours, right)


def test_h_goes_when_it_was_saved_elsewhere(watch):
    module, x = sm.MoE(D, N, E, K), torch.randn(T, D, requires_grad=True)
    right = step(module, x)
    watch.alive.clear()

    def offloaded(v):
        with torch.autograd.graph.save_on_cpu():
            return module(v)

    ours = step(module, x, offloaded)
    assert watch.alive == GONE
    assert_equal(ours, right)


def test_steps_need_less_memory_by_h(monkeypatch):
    """Every allocation is below what the package keeps for itself, so torch sees all of them."""
    tokens, d, n = 512, 256, 64
    w1, w2 = torch.randn(E, 2 * n, d) / d**0.5, torch.randn(E, d, n) / n**0.5
    x, router = torch.randn(tokens, d, requires_grad=True), torch.randn(E, d)
    leaves = [t.requires_grad_() for t in (x, router, w1, w2)]
    grad = torch.randn(tokens, d)
    most = {}
    for elements in (NEVER, 0):
        steps_from(monkeypatch, elements)
        y = sm.moe_layer(x, router, w1, w2, K, workspace_limit=LIMIT)[0]
        _, held = traced(lambda y=y: torch.autograd.grad(y, leaves, grad))
        most[elements] = int(held.max())
    h = tokens * K * 2 * n * 4
    assert most[NEVER] - most[0] >= h


# ------------------------------------------------------------------------------- graphs of torch


@pytest.mark.parametrize(
    ("backend", "router"), [("aot_eager", "token_rounding"), ("inductor", "topk")]
)
def test_a_compiled_backward_has_steps(backend, router, monkeypatch):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    steps_from(monkeypatch, 0)
    module = sm.MoE(D, N, E, K, router=router, tile=4)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for tokens in (T, T + 16):
        x = torch.randn(tokens, D, requires_grad=True)
        leaves = [x, *module.parameters()]
        right = torch.autograd.grad(module(x).square().sum(), leaves)
        ours = torch.autograd.grad(compiled(x).square().sum(), leaves)
        for a, b in zip(ours, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_torch_func_through_steps(monkeypatch):
    steps_from(monkeypatch, 0)
    w1, w2 = torch.randn(E, 2 * N, D) / D**0.5, torch.randn(E, D, N) / N**0.5
    router = torch.randn(E, D)

    def loss(x):
        return sm.moe_layer(x, router, w1, w2, K)[0].square().sum()

    batch = torch.randn(3, T, D)
    ours = torch.func.vmap(torch.func.grad(loss))(batch)
    steps_from(monkeypatch, NEVER)
    right = torch.stack([torch.func.grad(loss)(x) for x in batch])
    assert_equal([ours], [right])


def test_double_backward_through_steps_is_refused(monkeypatch):
    steps_from(monkeypatch, 0)
    module, x = sm.MoE(D, N, E, K), torch.randn(T, D, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()
