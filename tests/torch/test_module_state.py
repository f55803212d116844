"""Buffers and parameters of MoE through casting, deferred initialisation, loading and copying."""

import copy
import pickle

import pytest
import sonicmoe_cpp as sm
import torch

D, N, E, K = 8, 4, 6, 2
OPTIONS = {
    "scoring": "sigmoid_topk", "selection_bias": True, "router": "token_rounding", "tile": 4,
    "policy": "stochastic", "seed": 7,
}  # fmt: skip
FINE = torch.tensor([1.001, -0.999, 0.001, 0.0, 1.0, -1.0])  # no bfloat16 values


def layer(**options):
    module = sm.MoE(D, N, E, K, **OPTIONS | options)
    with torch.no_grad():
        module.router.selection_bias.copy_(FINE)
    return module


def train(module, x=None):
    """One step; returns y. The bias has to be usable and the seed has to advance."""
    x = torch.randn(16, D, dtype=module.experts.w1.dtype) if x is None else x
    before, seed = module.router.selection_bias.clone(), module.rounding_seed.clone()
    y = module(x)
    y.float().square().sum().backward()
    sm.update_expert_bias_(module.router.selection_bias, module.last_rows_per_expert_before, 1e-3)
    assert module.experts.w1.grad.abs().max() > 0 and not torch.equal(module.rounding_seed, seed)
    moved = (module.router.selection_bias - before).abs()
    assert moved.max() > 9e-4 and module.router.selection_bias.dtype == torch.float32
    return y


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("how", ["default", "context", "argument"])
def test_the_bias_is_float32_whatever_the_dtype_of_the_layer(how, default_dtype):
    if how == "default":
        default_dtype(torch.bfloat16)
    with torch.device("cpu"):
        module = sm.MoE(D, N, E, K, dtype=torch.bfloat16 if how != "default" else None, **OPTIONS)
    default_dtype(torch.float32)
    assert (
        module.experts.w1.dtype == torch.bfloat16
        and module.router.selection_bias.dtype == torch.float32
    )
    assert (module.router.selection_bias == 0).all() and module.rounding_seed.tolist() == [7]
    train(module)


CASTS = {
    "bfloat16()": lambda m: m.bfloat16(),
    "to(dtype)": lambda m: m.to(torch.bfloat16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.bfloat16),
    "to(tensor)": lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    "type()": lambda m: m.type(torch.bfloat16),
    "_apply": lambda m: m._apply(lambda t: t.bfloat16()),
    "of a parent": lambda m: torch.nn.Sequential(m).bfloat16()[0],
    "there and back": lambda m: m.half().double().float().bfloat16(),
    "a copy": lambda m: copy.deepcopy(m.bfloat16()),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casting_leaves_the_buffers(cast):
    module = CASTS[cast](layer())
    assert module.experts.w1.dtype == torch.bfloat16
    assert (
        torch.equal(module.router.selection_bias, FINE)
        and module.rounding_seed.dtype == torch.int64
    )
    train(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deferred_initialisation_makes_what_the_constructor_makes(dtype):
    with torch.device("meta"):
        module = layer()
    module = module.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        module.router.selection_bias.fill_(float("nan"))
        module.rounding_seed.fill_(-5)
    module.reset_parameters()
    assert (module.router.selection_bias == 0).all() and module.rounding_seed.tolist() == [7]
    assert all(p.isfinite().all() and p.abs().max() > 0 for p in module.parameters())
    train(module)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loading_keeps_the_bias_float32(assign, dtype):
    state = {name: value.to(dtype) for name, value in layer().state_dict().items()}
    assert "rounding_seed" not in state
    module = layer()
    module.load_state_dict(state, assign=assign)
    assert module.router.selection_bias.dtype == torch.float32
    assert torch.equal(module.router.selection_bias, FINE.to(dtype).float())
    train(module.float())


def test_loading_into_a_module_on_meta():
    """The seed is no part of a checkpoint and stays on meta: the first forward makes it anew."""
    source, x = layer(), torch.randn(16, D)
    with torch.device("meta"):
        module = layer()
    module.load_state_dict(source.state_dict(), assign=True)
    assert module.rounding_seed.device.type == "meta"
    outputs, seeds = [], []
    for each in (source, module):
        torch.manual_seed(5)
        outputs.append(each(x))
        seeds.append(each.rounding_seed)
    assert torch.equal(*outputs) and torch.equal(*seeds)


def test_a_bias_of_another_shape_is_refused_when_loading():
    state = layer().state_dict() | {"router.selection_bias": torch.zeros(E + 1)}
    for assign in (False, True):
        with pytest.raises(RuntimeError, match="selection_bias"):
            layer().load_state_dict(state, assign=assign)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (FINE.bfloat16(), "selection_bias: expected float32, got bfloat16"),
        (FINE.double(), "selection_bias: expected float32, got float64"),
        (FINE.to("meta"), "selection_bias: expected a tensor on cpu, as x, got meta"),
        (FINE[:5], "selection_bias: expected shape \\[6\\], got shape \\[5\\]"),
        (FINE[None], "selection_bias: expected 1 dimensions, got shape"),
    ],
)
def test_a_bias_made_unusable_by_others_is_refused_at_use(bias, message):
    """As sharding and offloading do it, behind the module's back; before a seed is drawn."""
    module, x = layer(), torch.randn(16, D)
    with pytest.raises(RuntimeError, match=message):
        torch.func.functional_call(module, {"router.selection_bias": bias}, (x,))
    module.router._buffers["selection_bias"] = bias
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=message):
        module(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_functional_call_uses_the_bias_it_is_given():
    module, x = layer().eval(), torch.randn(16, D)
    only_two = torch.tensor([0.0, 9.0, 0.0, 0.0, 9.0, 0.0])
    torch.func.functional_call(module, {"router.selection_bias": only_two}, (x,))
    assert module.last_rows_per_expert.tolist() == [0, 16, 0, 0, 16, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_cast_that_cannot_be_computed_is_refused_at_use(dtype):
    module = layer().to(dtype)
    with pytest.raises(RuntimeError, match="x: expected float32 or bfloat16, got float"):
        module(torch.randn(16, D, dtype=dtype))
    with pytest.raises(
        RuntimeError, match="router_weight: expected float32 or bfloat16, got float"
    ):
        module(torch.randn(16, D))


def test_a_default_dtype_that_cannot_be_computed_is_refused(default_dtype):
    default_dtype(torch.float64)
    with pytest.raises(ValueError, match="MoE: dtype: expected float32 or bfloat16, got .*default"):
        sm.MoE(D, N, E, K)


# ---------------------------------------------------------------------------- names of parameters

FORMER = {
    "router_weight": "router.weight", "router_b": "router.bias",
    "selection_bias": "router.selection_bias", "w1": "experts.w1", "w2": "experts.w2",
    "b1": "experts.b1", "b2": "experts.b2",
}  # fmt: skip


def with_former_names(state, prefix=""):
    former = {name: old for old, name in FORMER.items()}
    return {prefix + former[name.removeprefix(prefix)]: value for name, value in state.items()}


def full(**options):
    """Every parameter there is."""
    return layer(router_bias=True, expert_bias=True, **options)


def test_the_state_dict_has_the_names_of_the_children():
    assert set(full().state_dict()) == set(FORMER.values())
    assert set(layer().state_dict()) == {
        "router.weight", "router.selection_bias", "experts.w1", "experts.w2"
    }  # fmt: skip


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_dict_of_before_the_children_loads(assign, inside, device):
    source, x = full().eval(), torch.randn(16, D)
    with torch.device(device):
        target = full().eval()
    if device == "meta" and not assign:
        target.to_empty(device="cpu")
    wrapped, prefix = (torch.nn.Sequential(target), "0.") if inside else (target, "")
    state = with_former_names(source.state_dict())
    given = {prefix + name: value for name, value in state.items()}
    kept = dict(given)
    assert str(wrapped.load_state_dict(given, assign=assign)) == "<All keys matched successfully>"
    assert given.keys() == kept.keys(), "the caller's dict was changed"
    assert torch.equal(target(x), source(x))
    assert set(target.state_dict()) == set(FORMER.values())


def test_former_names_hide_no_mistake():
    state = with_former_names(full().state_dict())
    missing = {name: value for name, value in state.items() if name != "w2"}
    with pytest.raises(RuntimeError, match="Missing key.+experts.w2"):
        full().load_state_dict(missing)
    with pytest.raises(RuntimeError, match="Unexpected key.+w3"):
        full().load_state_dict(state | {"w3": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Unexpected key.+w2"):
        full().load_state_dict(state | full().state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for experts.w1"):
        full().load_state_dict(state | {"w1": torch.zeros(E, N, D)})


def test_copies_compute_with_the_options_of_the_original():
    source = full(activation="geglu", scale=0.5, num_groups=3, top_groups=2)
    twins = copy.deepcopy(source), pickle.loads(pickle.dumps(source))
    x = torch.randn(16, D)
    for mode in (True, False):
        outputs = []
        for module in (source.train(mode), *(twin.train(mode) for twin in twins)):
            torch.manual_seed(1)
            outputs.append(module(x))
            assert module.options == source.options
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("shape", [(D,), (16, D), (2, 8, D), (2, 1, 4, D), (2, 0, D)])
def test_y_is_no_view_and_has_the_shape_of_x(shape):
    module = sm.MoE(D, N, E, K)
    x = torch.randn(shape, requires_grad=True)
    y, logits, _ = module(x, return_router=True)
    assert y.shape == shape and y._base is None and logits.shape == (*shape[:-1], E)
    rows = module(x.reshape(-1, D))
    assert torch.equal(y.reshape(-1, D), rows)
    y += 1  # changes nothing that backward needs
    y.square().sum().backward()
    assert x.grad.shape == shape and (x.numel() == 0 or x.grad.abs().max() > 0)


@pytest.mark.parametrize("strides", ["transposed", "expanded", "sliced", "columns"])
def test_x_of_any_strides(strides):
    module = sm.MoE(D, N, E, K)
    x = {
        "transposed": lambda: torch.randn(8, 2, D).transpose(0, 1),
        "expanded": lambda: torch.randn(1, 8, D).expand(2, 8, D),
        "sliced": lambda: torch.randn(2, 9, D)[:, :8],
        "columns": lambda: torch.randn(2, 8, 2 * D)[..., :D],
    }[strides]()
    assert not x.is_contiguous() and torch.equal(module(x), module(x.contiguous()))


# ------------------------------------------------------------------------- rows of token choice


@pytest.mark.parametrize("policy", ["nearest", "up", "down"])
@pytest.mark.parametrize("experts", [1, 4])
def test_the_balancing_loss_measures_token_choice(policy, experts):
    """Evenly spread tokens give 1, also where rounding leaves every expert without a row."""
    tokens, width = 24, 8
    router = 5 * torch.eye(experts, width)
    x = torch.eye(experts, width).repeat(tokens // experts, 1) * 5
    options = {"router": "token_rounding", "tile": 16, "policy": policy}
    module = sm.MoE(width, N, experts, 1, **options)
    with torch.no_grad():
        module.router.weight.copy_(router)
    _, logits, rows = module(x, return_router=True)
    assert rows.dtype == torch.int32 and rows.tolist() == [tokens // experts] * experts
    assert torch.equal(module.last_rows_per_expert_before, rows)
    assert (module.last_rows_per_expert % 16 == 0).all()
    loss = sm.load_balancing_loss(logits, rows, top_k=1)
    assert abs(loss - 1) < 1e-6
    weights = module.router.weight, module.experts.w1, module.experts.w2
    _, again, counted = sm.moe_layer(x, *weights, 1, **options)
    assert torch.equal(counted, rows) and torch.equal(again, logits)


def test_the_balancing_loss_of_a_rounded_layer_has_the_gradient_of_token_choice():
    x = torch.randn(2, 32, D)
    rounded = sm.MoE(D, N, E, K, router="token_rounding", tile=16)
    plain = sm.MoE(D, N, E, K)
    plain.load_state_dict(rounded.state_dict())
    for module in (rounded, plain):
        _, logits, rows = module(x, return_router=True)
        assert int(rows.sum()) == 64 * K
        sm.load_balancing_loss(logits, rows, top_k=K).backward()
    assert not torch.equal(rounded.last_rows_per_expert, rounded.last_rows_per_expert_before)
    right = plain.router.weight.grad
    assert right.abs().max() > 0
    assert (rounded.router.weight.grad - right).abs().max() <= 1e-6 * right.abs().max()
    rounded.eval()(x)
    assert torch.equal(rounded.last_rows_per_expert, rounded.last_rows_per_expert_before)
