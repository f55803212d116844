"""Replaced blocks under accelerate's offloading, FSDP, DDP and adapters: the stock model's
results."""

import copy

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

import sonicmoe_cpp.integrations.transformers as hf
from hf_models import (
    FAMILIES,
    build,
    exact,
    fused,
    moe_blocks,
    outputs,
    router_name,
    router_of,
    same,
    tokens,
)

try:
    import accelerate
    from accelerate import hooks
except ModuleNotFoundError:
    accelerate = None

needs_accelerate = pytest.mark.skipif(accelerate is None, reason="accelerate is not installed")

ORDERS = ["place_first", "replace_first"]


def both(place, order, model, **options):
    """model with its blocks replaced and placed, in either order."""
    if order == "place_first":
        model = place(model)
        hf.replace_moe_blocks(model, **options)
        return model
    hf.replace_moe_blocks(model, **options)
    return place(model)


def calls(monkeypatch):
    """Counts how the blocks run from now on: the fused layer, or calls."""
    counts = {"_fused": 0, "_by_calls": 0, "_rounded_by_calls": 0}
    for name in counts:
        inner = getattr(hf.SonicMoEBlock, name)

        def counted(self, *arguments, _name=name, _inner=inner):
            counts[_name] += 1
            return _inner(self, *arguments)

        monkeypatch.setattr(hf.SonicMoEBlock, name, counted)
    return counts


# ------------------------------------------------------------------------------------- accelerate


def cpu_offload(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def disk_offload(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def preloaded_blocks(model, folder):
    names = [type(block).__name__ for block in moe_blocks(model)]
    return accelerate.cpu_offload(
        model, execution_device=torch.device("cpu"), preload_module_classes=names
    )


def dispatched(model, folder):
    """Experts on the disk, everything else in place, a hook at every module with parameters."""
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    experts = {name for name, _ in model.named_modules() if name.endswith(".experts")}
    device_map = {name: "cpu" for name in leaves if not name.endswith("act_fn")}
    device_map |= {name: "disk" for name in experts}
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True
    )


def hooked_everywhere(model, folder):
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(torch.device("cpu")))
    return model


@needs_accelerate
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "place", [cpu_offload, disk_offload, preloaded_blocks, dispatched, hooked_everywhere]
)
def test_offloading(place, order, tmp_path):
    stock, ids = build("qwen3_moe").eval(), tokens()
    model = both(lambda model: place(model, tmp_path), order, copy.deepcopy(stock))
    with torch.no_grad():
        same(model(ids).logits, exact(stock)(ids).logits)
    assert all(block.last_rows_per_expert.sum() == ids.numel() * 3 for block in moe_blocks(model))
    hooks.remove_hook_from_submodules(model)
    assert all(fused(model))
    with torch.no_grad():
        same(model(ids).logits, exact(stock)(ids).logits)


@needs_accelerate
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_moe"])
def test_offloading_of_every_family(family):
    stock, ids = build(family).eval(), tokens()
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model)
    cpu_offload(model, None)
    with torch.no_grad():
        same(model(ids).logits, exact(stock)(ids).logits)


@needs_accelerate
def test_a_dispatched_model_trains_with_rounding():
    stock, ids = build("qwen3_moe"), tokens()
    results = []
    for place in (lambda model: model, lambda model: hooked_everywhere(model, None)):
        model = place(copy.deepcopy(stock))
        hf.replace_moe_blocks(model, router="token_rounding", tile=8)
        results.append((outputs(model, ids), moe_blocks(model)))
    ((out, grads), blocks), ((placed_out, placed_grads), placed_blocks) = results
    same(placed_out.logits, out.logits)
    for name in grads:
        same(placed_grads[name], grads[name])
    for block, placed in zip(blocks, placed_blocks, strict=True):
        assert torch.equal(block.last_rows_per_expert, placed.last_rows_per_expert)
        assert (block.last_rows_per_expert % 8 == 0).all()


@needs_accelerate
def test_a_hook_that_does_more_than_move():
    class Scale(hooks.ModelHook):
        def post_forward(self, module, output):
            return output[0], output[1] * 0.5, output[2]

    def place(model):
        for block in moe_blocks(model):
            hooks.add_hook_to_module(router_of(block), Scale())
        return model

    stock, ids = build("mixtral"), tokens()
    expected = place(exact(stock))(ids).logits
    for order in ORDERS:
        same(both(place, order, copy.deepcopy(stock))(ids).logits, expected)
        with pytest.raises(ValueError, match="gate: token_rounding: expected"):
            both(place, order, copy.deepcopy(stock), router="token_rounding", tile=8)(ids)


# --------------------------------------------------------------------------------------- sharding


@pytest.fixture(scope="module")
def mesh():
    """A process group of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def fsdp2(parts, mesh):
    from torch.distributed.fsdp import fully_shard

    def place(model):
        for block in moe_blocks(model):
            for part in parts:
                module = {"router": router_of(block), "experts": block.experts, "block": block}[
                    part
                ]
                fully_shard(module, mesh=mesh)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return place


def fsdp1(parts):
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrap(module):
        return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))

    def place(model):
        for layer in model.model.layers:
            block = layer.mlp
            if "router" in parts:
                setattr(block, router_name(block), wrap(router_of(block)))
            if "experts" in parts:
                block.experts = wrap(block.experts)
            if "block" in parts:
                layer.mlp = wrap(block)
        return model

    return place


def ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def check_training(place, order, monkeypatch, family="qwen3_moe"):
    """Logits and gradients; returns how the blocks ran."""
    stock, ids = build(family), tokens()
    expected, expected_grads = outputs(exact(stock), ids)
    model = both(place, order, copy.deepcopy(stock))
    counts = calls(monkeypatch)
    out, grads = outputs(model, ids)
    same(out.logits, expected.logits)
    assert len(grads) == len(expected_grads)
    for name, grad in grads.items():
        name = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
        full = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        same(full, expected_grads[name])
    return counts


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "parts", [(), ("block",), ("experts",), ("router",), ("router", "experts")]
)
def test_fsdp2(parts, order, mesh, monkeypatch):
    counts = check_training(fsdp2(parts, mesh), order, monkeypatch)
    whole = parts in ((), ("block",))
    assert counts == {"_fused": 2 * whole, "_by_calls": 2 * (not whole), "_rounded_by_calls": 0}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("parts", [("block",), ("experts",), ("router",)])
@pytest.mark.filterwarnings("ignore")
def test_fsdp1(parts, order, mesh, monkeypatch):
    counts = check_training(fsdp1(parts), order, monkeypatch)
    whole = parts == ("block",)
    assert counts == {"_fused": 2 * whole, "_by_calls": 2 * (not whole), "_rounded_by_calls": 0}


@pytest.mark.parametrize("order", ORDERS)
def test_ddp(order, mesh, monkeypatch):
    assert check_training(ddp, order, monkeypatch, "gpt_oss")["_fused"] == 2


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_fsdp2_of_other_families(family, mesh, monkeypatch):
    check_training(fsdp2(("experts",), mesh), "replace_first", monkeypatch, family)


@pytest.mark.parametrize("order", ORDERS)
def test_rounding_with_sharded_experts(order, mesh, monkeypatch):
    stock, ids = build("qwen3_moe"), tokens()
    twin = copy.deepcopy(stock)
    options = {"router": "token_rounding", "tile": 8}
    hf.replace_moe_blocks(twin, **options)
    expected = outputs(twin, ids)[0].logits
    for parts, used in ((("experts",), "_rounded_by_calls"), (("block",), "_fused")):
        model = both(fsdp2(parts, mesh), order, copy.deepcopy(stock), **options)
        with monkeypatch.context() as patch:
            counts = calls(patch)
            same(outputs(model, ids)[0].logits, expected)
        assert counts[used] == 2 and sum(counts.values()) == 2


def test_sharded_weights_that_nobody_gathers_are_named(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    hf.register()
    for replaced in (True, False):
        model = build("qwen3_moe")
        model.set_experts_implementation("sonicmoe_cpp")
        for block in moe_blocks(model):
            shards = distribute_tensor(block.experts.down_proj.data, mesh, [Shard(0)])
            block.experts.down_proj = torch.nn.Parameter(shards)
        if replaced:
            hf.replace_moe_blocks(model)
        with pytest.raises(ValueError, match="down_proj: expected a plain tensor, got DTensor"):
            model(tokens())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_named(dtype):
    model = build("qwen3_moe")
    hf.replace_moe_blocks(model)
    for block in moe_blocks(model):
        packed = torch.zeros(block.experts.gate_up_proj.shape).to(dtype)
        block.experts.gate_up_proj = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(
        ValueError, match=f"gate_up_proj: expected float32 or bfloat16, got {dtype}"
    ):
        model(tokens())


@pytest.mark.parametrize("order", ORDERS)
def test_halves_of_the_experts_add_up(order):
    """Expert parallelism: what other ranks hold gets the id num_experts on the way in."""
    whole, x = build("qwen3_moe", num_hidden_layers=1), torch.randn(2, 8, 32)
    results = []
    for first in (0, 4):

        def place(model, first=first):
            experts = moe_blocks(model)[0].experts
            for name in ("gate_up_proj", "down_proj"):
                half = getattr(experts, name).data[first : first + 4].clone()
                setattr(experts, name, torch.nn.Parameter(half))
            experts.num_experts, experts._is_expert_parallel = 4, True
            inner = experts.forward

            def forward(x, ids, weights):
                ours = (ids >= first) & (ids < first + 4)
                ids = torch.where(ours, ids - first, 4)
                return inner(x, ids, weights.masked_fill(~ours, 0))

            experts.forward = forward
            return model

        model = both(place, order, copy.deepcopy(whole))
        results.append(moe_blocks(model)[0](x))
        assert moe_blocks(model)[0].last_rows_per_expert.sum() == 2 * 8 * 3
    assert all(result.abs().max() > 1e-2 for result in results)
    same(sum(results), moe_blocks(exact(whole))[0](x.double()))


# --------------------------------------------------------------------------------------- adapters


def lora(parameters=(), modules=(), **options):
    import peft

    def place(model):
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=list(modules),
            target_parameters=list(parameters),
            init_lora_weights=False,
            **options,
        )
        return peft.get_peft_model(model, config)

    return place


ADAPTERS = {
    "experts": ({"parameters": ["experts.gate_up_proj", "experts.down_proj"]}, False),
    "router": ({"parameters": ["gate.weight"]}, False),
    "saved_router": ({"modules": ["o_proj"], "modules_to_save": ["gate"]}, False),
    "attention": ({"modules": ["o_proj"]}, True),
}


@pytest.mark.parametrize("where", [*ORDERS, "backend"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter, where):
    pytest.importorskip("peft")
    options, plain = ADAPTERS[adapter]
    place = lora(**options)
    stock, ids = build("qwen3_moe"), tokens()
    unchanged = exact(stock)(ids).logits
    expected, expected_grads = outputs(place(copy.deepcopy(stock)).double(), ids)
    assert (expected.logits - unchanged).abs().max() > 1e-2
    if where == "backend":
        hf.register()
        model = copy.deepcopy(stock)
        model.set_experts_implementation("sonicmoe_cpp")
        model = place(model)
    else:
        model = both(place, where, copy.deepcopy(stock))
        assert all(value is plain for value in fused(model))
    out, grads = outputs(model, ids)
    same(out.logits, expected.logits)
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        same(grads[name], expected_grads[name])


@pytest.mark.parametrize("order", ORDERS)
def test_adapters_of_gpt_oss_and_back(order):
    """peft gives the experts a subclass of their class for the time of a forward."""
    pytest.importorskip("peft")
    place = lora(parameters=["experts.gate_up_proj", "experts.down_proj"])
    stock, ids = build("gpt_oss"), tokens()
    expected = place(copy.deepcopy(stock)).double()
    model = both(place, order, copy.deepcopy(stock))
    same(model(ids).logits, expected(ids).logits)
    assert not any(fused(model))
    merged, right = model.merge_and_unload(), expected.merge_and_unload()
    assert all(fused(merged))
    same(merged(ids).logits, right(ids).logits)


def test_rounding_with_adapters():
    pytest.importorskip("peft")
    ids = tokens()
    options = {"router": "token_rounding", "tile": 8}
    model = both(
        lora(parameters=["experts.down_proj"]), "replace_first", build("mixtral"), **options
    )
    outputs(model, ids)
    for block in moe_blocks(model):
        assert (block.last_rows_per_expert % 8 == 0).all() and block.last_rows_per_expert.sum() > 0
    router = lora(parameters=["gate.weight"])
    with pytest.raises(ValueError, match="gate: token_rounding: expected .*ParamWrapper"):
        both(router, "place_first", build("mixtral"), **options)
    with pytest.raises(ValueError, match="gate: token_rounding: expected .*ParamWrapper"):
        both(router, "replace_first", build("mixtral"), **options)(ids)
