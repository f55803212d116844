"""Activations and gates are recognised by what they are: the module's loop in float64 decides."""

import copy
import functools

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

import sonicmoe_cpp.integrations.transformers as hf
from hf_models import build, moe_blocks, same
from transformers.activations import ACT2CLS, ACT2FN, GELUActivation, GELUTanh
from transformers.integrations.moe import use_experts_implementation


class SiLUWithoutOwnForward(nn.SiLU):
    pass


class SiLUTimesTwo(nn.SiLU):
    def forward(self, x):
        return 2 * super().forward(x)


def with_own_forward():
    act = nn.SiLU()
    act.forward = lambda x: x
    return act


def gelu_of_another_function():
    act = GELUActivation()
    act.act = torch.tanh
    return act


class Unhashable:
    __hash__ = None

    def __call__(self, x):
        return F.silu(x)


KNOWN = {
    "silu function": F.silu,
    "relu function": F.relu,
    "torch.relu": torch.relu,
    "gelu function": F.gelu,
    "gelu tanh partial": functools.partial(F.gelu, approximate="tanh"),
    "gelu none partial": functools.partial(F.gelu, approximate="none"),
    "silu partial": functools.partial(F.silu, inplace=False),
    "nn.SiLU": nn.SiLU(),
    "nn.ReLU": nn.ReLU(),
    "nn.GELU": nn.GELU(),
    "nn.GELU tanh": nn.GELU(approximate="tanh"),
    "GELUActivation in Python": GELUActivation(use_gelu_python=True),
    "GELUTanh in Python": GELUTanh(use_gelu_tanh_python=True),
    "subclass": SiLUWithoutOwnForward(),
} | {
    name: ACT2FN[name]
    for name in (
        "silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate",
        "gelu_pytorch_tanh", "gelu_python_tanh", "relu",
    )
}  # fmt: skip
UNKNOWN = {
    "lambda": lambda x: F.silu(x),
    "sigmoid": torch.sigmoid,
    "leaky": functools.partial(F.leaky_relu, negative_slope=0.1),
    "unhashable": Unhashable(),
    "partial of a lambda": functools.partial(lambda x: F.silu(x)),
    "forward of a subclass": SiLUTimesTwo(),
    "forward on the instance": with_own_forward(),
    "gelu of another function": gelu_of_another_function(),
    "sequence": nn.Sequential(nn.SiLU(), nn.Dropout(0.5)),
    "learned": nn.PReLU(),
    "random": nn.RReLU(),
} | {
    name: ACT2FN[name]
    for name in sorted(ACT2CLS)
    if name not in KNOWN and name not in ("relu2", "xielu")
}


def config():
    return build("qwen3_moe", num_hidden_layers=1).config


@use_experts_implementation(has_gate=False)
class UngatedExperts(nn.Module):
    """Experts of the interface without a gate; the loop is their definition."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = 8
        self.up_proj = nn.Parameter(torch.randn(8, 24, 32) / 4)
        self.down_proj = nn.Parameter(torch.randn(8, 32, 24) / 4)
        self.act_fn = nn.ReLU()

    def forward(self, x, ids, weights):
        y = torch.zeros_like(x)
        for e in range(8):
            share = (weights * (ids == e)).sum(-1, keepdim=True)
            y = y + share * (self.act_fn(x @ self.up_proj[e].T) @ self.down_proj[e].T)
        return y


def gated_experts():
    return moe_blocks(build("qwen3_moe", num_hidden_layers=1))[0].experts


def put_activation(experts, act):
    del experts.act_fn  # a function cannot take a module's place otherwise
    experts.act_fn = act


def routed():
    x = 2 * torch.randn(24, 32)  # far enough for the forms of GELU to differ
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(24)])
    return x, ids, torch.rand(24, 3)


def loop(experts, x, ids, weights):
    right = copy.deepcopy(experts).double()
    right.config._experts_implementation = "eager"
    x = x.double().requires_grad_()
    y = right(x, ids, weights.double())
    y.square().sum().backward()
    return y.detach(), x.grad


def check(experts, run=None):
    hf.register()
    x, ids, weights = routed()
    y, grad = loop(experts, x, ids, weights)
    experts.config._experts_implementation = "sonicmoe_cpp"
    ours = x.clone().requires_grad_()
    out = (experts if run is None else run)(ours, ids, weights)
    out.square().sum().backward()
    same(out, y, tolerance=2e-6)  # the two forms of GELU differ by 1e-4
    same(ours.grad, grad, tolerance=1e-5)


@pytest.mark.parametrize("name", KNOWN)
def test_known_activations(name):
    experts = gated_experts()
    put_activation(experts, KNOWN[name])
    check(experts)


@pytest.mark.parametrize("name", [*KNOWN, "relu2"])
def test_known_activations_without_a_gate(name):
    experts = UngatedExperts(config())
    put_activation(experts, KNOWN[name] if name in KNOWN else ACT2FN[name])
    check(experts)


@pytest.mark.parametrize("name", ["silu function", "nn.GELU tanh", "gelu", "gelu tanh partial"])
def test_recognised_when_compiled(name):
    experts = gated_experts()
    put_activation(experts, KNOWN[name])
    torch._dynamo.reset()
    check(experts, torch.compile(experts, backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", [*UNKNOWN, "relu2"])
def test_unknown_activations_are_refused_by_name(name, gated):
    if name == "relu2":
        gated, act = True, ACT2FN[name]  # the library squares without a gate only
    else:
        act = UNKNOWN[name]
    hf.register()
    experts = gated_experts() if gated else UngatedExperts(config())
    put_activation(experts, act)
    experts.config._experts_implementation = "sonicmoe_cpp"
    shown = type(act).__name__ if isinstance(act, nn.Module) else getattr(act, "__qualname__", "")
    with pytest.raises(
        ValueError, match=r"act_fn: expected one of .*, got the activation"
    ) as error:
        experts(*routed())
    assert shown in str(error.value)


def test_the_activation_is_read_at_every_forward():
    model = build("qwen3_moe")
    hf.replace_moe_blocks(model)
    block = moe_blocks(model)[0]
    for act in (F.silu, nn.GELU("tanh")):
        put_activation(block.experts, act)
        assert block.why_called() is None
        x = torch.randn(2, 8, 32)
        right = copy.deepcopy(block).double()
        right.experts.config._experts_implementation = "eager"
        right.gate.register_forward_hook(lambda module, inputs, output: output)  # through its calls
        same(block(x), right(x.double()))
    put_activation(block.experts, nn.Tanh())
    with pytest.raises(ValueError, match="experts.act_fn: .* got the activation Tanh"):
        block(torch.randn(2, 8, 32))


def test_hooks_on_the_activation_are_refused():
    model = build("qwen3_moe")
    act = moe_blocks(model)[1].experts.act_fn
    handle = act.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.experts\.act_fn: expected no hooks"
    ):
        hf.replace_moe_blocks(model)
    hf.register()
    model.set_experts_implementation("sonicmoe_cpp")
    x = torch.randint(3, 64, (1, 4))
    with pytest.raises(ValueError, match=r"act_fn: expected no hooks"):
        model(x)
    handle.remove()
    model(x)
    hf.replace_moe_blocks(model)
    act.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(ValueError, match=r"act_fn: expected no hooks"):
        model(x)


def test_the_gate_of_gpt_oss():
    """In a subclass of another name too; not where the subclass or the instance has its own."""
    hf.register()
    experts = moe_blocks(build("gpt_oss", num_hidden_layers=1))[0].experts
    stock = type(experts)
    experts.__class__ = type("Renamed", (stock,), {})
    check(experts)
    experts.__class__ = type(
        "Other", (stock,), {"_apply_gate": lambda self, h: stock._apply_gate(self, h)}
    )
    with pytest.raises(ValueError, match="_apply_gate: expected"):
        experts(*routed())
    experts.__class__ = stock
    experts._apply_gate = lambda h: h[..., ::2]
    with pytest.raises(ValueError, match="_apply_gate: expected"):
        experts(*routed())
    del experts._apply_gate
    for name, value in (("alpha", 1.5), ("limit", None), ("limit", 0.0)):
        right = getattr(experts, name)
        setattr(experts, name, value)
        with pytest.raises(ValueError, match=f"{name} .*expected .*, got {value}"):
            experts(*routed())
        setattr(experts, name, right)
    check(experts)


def test_the_default_gate_on_the_instance():
    experts = gated_experts()
    hf.register()
    experts.config._experts_implementation = "sonicmoe_cpp"
    experts._apply_gate = lambda h: F.gelu(h.chunk(2, -1)[0])
    with pytest.raises(ValueError, match="Qwen3MoeExperts._apply_gate: expected"):
        experts(*routed())
