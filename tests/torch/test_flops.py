"""torch.utils.flop_counter counts for the operators what it counts for the same layer in eager
PyTorch (eager.py)."""

import subprocess
import sys
from pathlib import Path

import eager
import pytest
import sonicmoe_cpp as sm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

PACKAGE = Path(__file__).resolve().parents[2] / "bindings" / "torch"
T, D, N, E, K = 12, 8, 4, 6, 3
PARAMETERS = ("x", "w1", "w2", "weights")


def counted(call, needs=()):
    """FLOPs of a call and, where anything in `needs` requires a gradient, of its backward."""
    with FlopCounterMode(display=False) as counter:
        result = call()
        if needs:
            result.sum().backward()
    return counter.get_total_flops()


def tensors(activation, needs):
    gate = 2 if activation == "swiglu" else 1
    made = {
        "x": torch.randn(T, D),
        "w1": torch.randn(E, gate * N, D),
        "w2": torch.randn(E, D, N),
        "weights": torch.rand(T, K),
        "ids": torch.stack([torch.randperm(E)[:K] for _ in range(T)]),
    }
    for name in needs:
        made[name].requires_grad_()
    return made


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("needs", [(), PARAMETERS, ("x",), ("w1",), ("w2",), ("x", "w2")])
@pytest.mark.parametrize("form", ["top_k", "pairs", "sorted"])
def test_experts_count_as_eager_experts(activation, needs, form):
    if form == "sorted":
        needs = tuple(name for name in needs if name != "weights")
    given = tensors(activation, needs)
    x, w1, w2, ids, weights = (given[name] for name in ("x", "w1", "w2", "ids", "weights"))
    tokens = torch.arange(T).repeat_interleave(K)
    offsets = torch.tensor([2, 2, 5, 9, 11, T], dtype=torch.int32)
    expert_of_row = torch.bucketize(torch.arange(T), offsets, right=True)
    calls = {
        "top_k": (
            lambda: sm.moe(x, w1, w2, ids, weights, activation=activation),
            lambda: eager.top_k(x, w1, w2, ids, weights, activation=activation),
        ),
        "pairs": (
            lambda: sm.moe_pairs(
                x, w1, w2, tokens, ids.flatten(), weights.flatten(), activation=activation
            ),
            lambda: eager.top_k(x, w1, w2, ids, weights, activation=activation),
        ),
        "sorted": (
            lambda: sm.moe_sorted(x, w1, w2, offsets, activation=activation),
            lambda: eager.pairs(
                x, w1, w2, torch.arange(T), expert_of_row, torch.ones(T), activation=activation
            ),
        ),
    }
    ours, plain = calls[form]
    right = counted(plain, needs)
    assert counted(ours, needs) == right > 0


def eager_layer(x, router, w1, w2, activation):
    ids, weights = eager.route(x @ router.T, K)
    return eager.top_k(x, w1, w2, ids, weights, activation=activation)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("needs", [(), ("x", "router", "w1", "w2"), ("router", "w1", "w2")])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_layer_counts_as_an_eager_layer(activation, needs, rounded):
    given = tensors(activation, ())
    x, w1, w2, router = given["x"], given["w1"], given["w2"], torch.randn(E, D)
    for name, tensor in (("x", x), ("w1", w1), ("w2", w2), ("router", router)):
        tensor.requires_grad_(name in needs)
    options = {"activation": activation}
    if rounded:  # counts as the token choice that it rounds
        options |= {"router": "token_rounding", "tile": 4}
    right = counted(lambda: eager_layer(x, router, w1, w2, activation), needs)
    assert counted(lambda: sm.moe_layer(x, router, w1, w2, K, **options)[0], needs) == right > 0


@pytest.mark.parametrize("needs", [("x", "router", "w1", "w2"), ("router", "w1", "w2")])
def test_a_backward_in_steps_counts_as_an_eager_one(needs, monkeypatch):
    monkeypatch.setattr("sonicmoe_cpp._library.STEPS_FROM_BYTES", 0)
    given = tensors("swiglu", ()) | {"router": torch.randn(E, D)}
    for name in needs:
        given[name].requires_grad_()
    x, w1, w2, router, ids = (given[name] for name in ("x", "w1", "w2", "router", "ids"))
    right = counted(lambda: eager_layer(x, router, w1, w2, "swiglu"), needs)
    assert counted(lambda: sm.moe_layer(x, router, w1, w2, K)[0], needs) == right > 0
    weights = given["weights"].requires_grad_()
    right = counted(lambda: eager.top_k(x, w1, w2, ids, weights), needs)
    assert counted(lambda: sm.moe(x, w1, w2, ids, weights), needs) == right > 0


def test_the_module_counts_by_module_and_into_main_grads():
    layer, x = sm.MoE(D, N, E, K), torch.randn(2, T // 2, D, requires_grad=True)
    weights = (layer.router.weight, layer.experts.w1, layer.experts.w2)
    plain = [w.detach().clone().requires_grad_() for w in weights]
    rows = x.detach().reshape(T, D).requires_grad_()
    right = counted(lambda: eager_layer(rows, *plain, "swiglu"), True)
    assert counted(lambda: layer(x), True) == right
    for w in weights:
        w.main_grad = torch.zeros_like(w)
    layer = sm.MoE(D, N, E, K, main_grad=True)
    for w in layer.parameters():
        w.main_grad = torch.zeros_like(w)
    assert counted(lambda: layer(x), True) == right


def test_fake_tensors_count_as_real_ones():
    def both():
        given = tensors("swiglu", PARAMETERS)
        router = torch.randn(E, D, requires_grad=True)
        x, w1, w2 = given["x"], given["w1"], given["w2"]
        return (
            counted(lambda: sm.moe(x, w1, w2, given["ids"], given["weights"]), True),
            counted(lambda: sm.moe_layer(x, router, w1, w2, K)[0], True),
        )

    real = both()
    with FakeTensorMode():
        assert both() == real > (0, 0)


def test_every_operator_has_a_formula():
    operators = {
        schema.name.removeprefix("sonicmoe_cpp::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("sonicmoe_cpp::")
    }
    takes_tensors = {
        name
        for name in operators
        if "Tensor" in str(getattr(torch.ops.sonicmoe_cpp, name).default._schema)
    }
    assert "moe_forward" in takes_tensors
    registered = {getattr(torch.ops.sonicmoe_cpp, name) for name in takes_tensors}
    assert registered <= set(flop_registry)


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_counter_is_imported_on_request_in_either_order(order):
    count = """
layer, x = sm.MoE(8, 4, 6, 3), torch.randn(12, 8)
with FlopCounterMode(display=False) as counter:
    layer(x)
print(counter.get_total_flops())
"""
    counter = "from torch.utils.flop_counter import FlopCounterMode"
    package = 'import sonicmoe_cpp as sm\nprint("torch.utils.flop_counter" in sys.modules)'
    lines = [counter, package] if order == "before" else [package, counter]
    script = "\n".join(["import sys, torch", *lines, count])
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(PACKAGE), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    products = 2 * T * D * E + 6 * T * K * D * N
    assert result.stdout.split() == [str(order == "before"), str(products)]
