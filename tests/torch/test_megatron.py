"""The experts of Megatron-Core's MoE layer by this library, against its own, on CPUs.

Of its dispatchers the all-gather runs without a GPU, once its router is told where to be, and that
there is no TransformerEngine (0.16.1 asks a name that only its import makes).
"""

import socket
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytest.importorskip("megatron.core")
if not dist.is_available():
    pytest.skip("torch.distributed is not built", allow_module_level=True)

import sonicmoe_cpp.integrations.megatron as sonic
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.mapping import apply_factories, apply_factory_merges
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

EXPERTS = 6


@pytest.fixture(autouse=True, scope="module")
def one_process():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    if not hasattr(moe_utils, "te_general_gemm"):
        monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)


def configuration(**changes):
    return TransformerConfig(**{
        "num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 24,
        "moe_ffn_hidden_size": 24, "num_moe_experts": EXPERTS, "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "allgather",
        "add_bias_linear": False, "gated_linear_unit": True, "activation_func": F.silu,
        "bias_activation_fusion": False, "use_cpu_initialization": True,
        "moe_shared_expert_intermediate_size": 16, "gradient_accumulation_fusion": False,
    } | changes)  # fmt: skip


def layer(ours, **changes):
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    if ours:
        assert sonic.replace_experts(spec) == 1
    built = build_module(spec, config=configuration(**changes), layer_number=1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.3)
    return built


def pair(**changes):
    theirs, ours = layer(False, **changes), layer(True, **changes)
    assert isinstance(theirs.experts, SequentialMLP)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step(module):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 2, 32, generator=generator, requires_grad=True)
    y, _ = module(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def same(ours, theirs):
    assert theirs.abs().max() > 0 and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("changes", [
    {},
    {"activation_func": F.gelu},
    {"gated_linear_unit": False, "activation_func": squared_relu},
    {"moe_router_topk": 1, "moe_apply_probs_on_input": True, "moe_router_pre_softmax": True},
])  # fmt: skip
def test_outputs_and_gradients_are_those_of_megatron(changes):
    theirs, ours = pair(**changes)
    for mine, right in zip(step(ours), step(theirs), strict=True):
        same(mine, right)
    same(ours.router.weight.grad, theirs.router.weight.grad)
    for name, linear in (("w1", "linear_fc1"), ("w2", "linear_fc2")):
        experts = theirs.experts.local_experts
        right = [getattr(expert, linear).weight for expert in experts]
        for mine, weight in zip(getattr(ours.experts, name).grad, right, strict=True):
            same(mine, torch.zeros_like(weight) if weight.grad is None else weight.grad)


def test_state_dicts_have_the_names_of_megatron():
    theirs, ours = pair()
    right = theirs.state_dict()
    mine = ours.state_dict()
    assert {n for n in right if "_extra_state" not in n} == {
        n for n in mine if "_extra_state" not in n
    }
    assert all(torch.equal(t, right[n]) for n, t in mine.items() if isinstance(t, torch.Tensor))


def shards(state):
    apply_factories(state)
    found, todo = [], [state]
    while todo:
        each = todo.pop()
        if isinstance(each, (dict, list)):
            todo += each.values() if isinstance(each, dict) else each
        elif hasattr(each, "global_offset"):
            found.append(each)
    return sorted(found, key=lambda s: (s.key, s.global_offset))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("gated", [True, False])
def test_sharded_checkpoints_are_those_of_megatron(single, gated):
    """As rank 1 of two that hold the experts."""
    theirs, ours = pair(gated_linear_unit=gated)
    group = types.SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    theirs.experts.ep_group = ours.experts.ep_group = group
    offsets = ((0, 3, 4),)  # the fourth of four layers
    metadata = {"singleton_local_shards": single, "dp_cp_group": parallel_state.
                get_data_parallel_group(with_context_parallel=True)}  # fmt: skip
    mine, right = (
        shards(each.experts.sharded_state_dict("layer.experts.", offsets, metadata))
        for each in (ours, theirs)
    )
    assert len(mine) == len(right) == EXPERTS * (5 if gated else 4)
    for one, other in zip(mine, right, strict=True):
        for field in ("key", "global_shape", "global_offset", "replica_id"):
            assert getattr(one, field) == getattr(other, field), field
        if other.data is not None:
            assert one.axis_fragmentations == other.axis_fragmentations
            assert torch.equal(one.data, other.data)


def test_a_sharded_checkpoint_goes_back_in():
    _, ours = pair()
    before = ours.experts.w1.detach().clone()
    state = ours.experts.sharded_state_dict("")
    factories = {name: part for name, part in state.items() if hasattr(part, "build_fn")}
    apply_factories(state)

    def data(part):
        return [data(each) for each in part] if isinstance(part, list) else part.data

    loaded = apply_factory_merges({name: data(part) for name, part in state.items()}, factories)
    with torch.no_grad():
        ours.experts.w1.zero_()
    ours.experts.load_state_dict(loaded)
    assert torch.equal(ours.experts.w1, before) and before.abs().sum() > 0


def test_no_rank_of_tensor_parallelism_takes_them_for_copies():
    second = types.SimpleNamespace(rank=lambda: 1)
    theirs, ours = pair()
    for experts in (theirs.experts, ours.experts):
        for parameter in experts.parameters():
            assert param_is_not_tensor_parallel_duplicate(parameter, second)
    assert not param_is_not_tensor_parallel_duplicate(ours.router.weight, second)


def test_no_rows():
    _, ours = pair()
    x = torch.zeros(0, 32, requires_grad=True)
    y, bias = ours.experts(x, torch.zeros(EXPERTS, dtype=torch.long), torch.zeros(0))
    y.sum().backward()
    assert y.shape == (0, 32) and bias is None and (ours.experts.w1.grad == 0).all()


@pytest.mark.parametrize(("changes", "name"), [
    ({"add_bias_linear": True}, "add_bias_linear"),
    ({"activation_func": torch.tanh}, "activation_func"),
    ({"activation_func": F.gelu, "bias_activation_fusion": True}, "activation_func"),
    ({"params_dtype": torch.float16}, "params_dtype"),
])  # fmt: skip
def test_what_it_does_not_compute_is_named(changes, name):
    with pytest.raises(RuntimeError, match=f"SonicExperts: {name}: expected"):
        layer(True, **changes)


def test_specs():
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    assert sonic.replace_experts([spec, spec]) == 1
    assert spec.submodules.mlp.submodules.experts.module is sonic.SonicExperts
    with pytest.raises(ValueError, match="replace_experts: spec: expected one with MoESubmodules"):
        sonic.replace_experts(get_gpt_layer_local_spec())
