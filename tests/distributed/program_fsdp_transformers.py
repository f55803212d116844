"""Models of transformers under fully_shard on two ranks, against one process."""

import copy
import functools
import itertools
import tempfile

import hf_models
import ranks
import sonicmoe_cpp.integrations.transformers as hf
import torch
import torch.distributed as dist
import transformers
from comparison import compare_gradients, mean_of, same
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

hf.register()


@functools.cache
def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def blocks(model):
    """The sparse block of each layer that has one."""
    return [block for layer in model.model.layers for block in hf_models.moe_blocks(layer)]


def prepared(way, stock, **options):
    model = copy.deepcopy(stock)
    if way == "replaced":
        assert hf.replace_moe_blocks(model, **options) > 0
    else:
        model.set_experts_implementation("sonicmoe_cpp")
    return model


def shard(plain, *arguments, **options):
    """A copy of plain, sharded."""
    return shard_(copy.deepcopy(plain), *arguments, **options)


def shard_(model, units=(), dim=0, **options):
    """Units: `units` of each sparse block ("" for itself), each layer, the rest."""
    options["mesh"] = mesh()

    def placement(parameter):
        return Shard(dim) if parameter.dim() == 3 else None

    for block in blocks(model):
        for unit in units:
            unit = unit.replace("router", hf_models.router_name(block))
            fully_shard(block.get_submodule(unit), shard_placement_fn=placement, **options)
    for layer in model.model.layers:
        fully_shard(layer, shard_placement_fn=placement, **options)
    return fully_shard(model, **options)


def batches():
    return torch.randint(3, 64, (dist.get_world_size(), 2, 12))


def mine(x):
    return x[dist.get_rank()]


def step(model, ids):
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def called(plain):
    """A copy whose blocks call router and experts, as where these are units of their own."""
    model = copy.deepcopy(plain)
    for block in blocks(model):
        block.experts.register_forward_hook(lambda *_: None)
    return model


def compare(ours, plain, ids, stock=None):
    """As comparison.compare; with the stock model in float64, that has all batches, 1e-3."""
    parts = [step(copy.deepcopy(plain), part) for part in ids]
    same(ours[0], mine(parts)[0], name="logits")
    compare_gradients(ours[1], mean_of([part[1] for part in parts]))
    if stock is not None:
        logits, gradients = step(hf_models.exact(stock), ids.flatten(0, 1))
        same(ours[0], mine(logits.chunk(2)), 1e-4, "logits")
        for name, right in gradients.items():
            assert right is not None and right.abs().max() > 0
            same(ours[1][name], right, 1e-3, name.replace("experts", ""))


UNITS = ((), ("",), ("experts",), ("router", "experts"))
WAYS = ("replaced", "backend")


def watch(model):
    """Why each block's forward, from now on, calls router and experts; None where it is fused."""
    reasons = []
    for block in blocks(model):
        block.register_forward_pre_hook(lambda block, _: reasons.append(block.why_called()))
    return reasons


def case_units():
    stock, ids = hf_models.build("qwen3_moe"), batches()
    for way in WAYS:
        plain = prepared(way, stock)
        for units, (dim, reshard) in itertools.product(UNITS, ((0, True), (1, False))):
            model = shard(plain, units, dim, reshard_after_forward=reshard)
            reasons = watch(model) if way == "replaced" else []
            right = called(plain) if "experts" in units else plain
            compare(step(model, mine(ids)), right, ids, stock if dim else None)
            assert all((reason is None) == ("experts" not in units) for reason in reasons), reasons


def case_families():
    ids = batches()
    for family in hf_models.FAMILIES:
        stock = hf_models.build(family)
        for way in WAYS:
            plain = prepared(way, stock)
            for units in ((), ("experts",)):
                right = called(plain) if units else plain
                compare(step(shard(plain, units), mine(ids)), right, ids)


def case_replaced_after_fully_shard():
    stock, ids = hf_models.build("qwen3_moe"), batches()
    plain = prepared("replaced", stock)
    for units in UNITS:
        model = shard(stock, units)
        assert hf.replace_moe_blocks(model) == 2
        compare(step(model, mine(ids)), called(plain) if "experts" in units else plain, ids)


def case_checkpointing():
    """Layers that run again in backward, also with rounding that draws."""
    stock, ids = hf_models.build("qwen3_moe"), batches()
    rounded = {"router": "token_rounding", "tile": 4, "policy": "stochastic"}
    for way, options in (("backend", {}), ("replaced", {}), ("replaced", rounded)):
        plain = prepared(way, stock, **options)
        for units in ((), ("experts",)):
            model = shard(plain, units)
            model.gradient_checkpointing_enable({"use_reentrant": False})
            ran = []
            for block in blocks(model):
                block.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
            torch.manual_seed(3)
            logits, gradients = step(model, mine(ids))
            assert len(ran) == 4, "nothing ran again"
            parts = []
            for part in ids:
                torch.manual_seed(3)
                parts.append(step(called(plain) if units else copy.deepcopy(plain), part))
            same(logits, mine(parts)[0])
            compare_gradients(gradients, mean_of([part[1] for part in parts]))


def case_accumulation():
    ids = torch.stack([batches() for _ in range(3)], 1)
    for way in WAYS:
        plain = prepared(way, hf_models.build("qwen3_moe"))
        model, parts = shard(plain, ("experts",)), []
        for microbatches in ids:
            twin = called(plain)
            for part in microbatches:
                twin(part, labels=part).loss.backward()
            parts.append({name: p.grad for name, p in twin.named_parameters()})
        for index, part in enumerate(mine(ids)):
            model.set_requires_gradient_sync(index == 2)
            model(part, labels=part).loss.backward()
        compare_gradients({name: p.grad for name, p in model.named_parameters()}, mean_of(parts))


def case_mixed_precision():
    """Computed in bfloat16, reduced in float32; the router too, or in float32 by its own unit."""
    ids, stock = batches(), hf_models.build("qwen3_moe")
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    exact = MixedPrecisionPolicy(torch.float32)
    for way, alone in itertools.product(WAYS, (False, True)):
        plain = prepared(way, stock)
        model = copy.deepcopy(plain)
        for block in blocks(model):
            if alone:
                fully_shard(hf_models.router_of(block), mesh=mesh(), mp_policy=exact)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh(), mp_policy=policy)
        logits, gradients = step(fully_shard(model, mesh=mesh(), mp_policy=policy), mine(ids))
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        routers = [hf_models.router_of(block) for block in blocks(plain)] if alone else []
        for router in routers:
            router.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        kept = {id(parameter) for router in routers for parameter in router.parameters()}
        for parameter in plain.parameters():
            if id(parameter) not in kept:
                parameter.data = parameter.data.bfloat16()
        parts = [step(copy.deepcopy(plain), part) for part in ids]
        same(logits, mine(parts)[0])
        compare_gradients(gradients, mean_of([part[1] for part in parts]))


def case_compile():
    stock, ids = hf_models.build("qwen3_moe", num_hidden_layers=1), batches()
    for way in WAYS:
        plain = prepared(way, stock)
        for units in ((), ("experts",)):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model = copy.deepcopy(plain)
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")  # inductor takes a minute
            logits, gradients = step(shard_(model, units), mine(ids))
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
            right = step(copy.deepcopy(plain), ids.flatten(0, 1))
            same(logits, mine(right[0].chunk(2)), 1e-4)
            compare_gradients(gradients, right[1], 1e-3)


def case_a_rank_without_a_token():
    """T = 0 on one rank: nobody waits, and it gives zeros to the sum."""
    for way, units in itertools.product(WAYS, UNITS):
        plain = prepared(way, hf_models.build("qwen3_moe"))
        block = blocks(plain)[0]
        x = torch.randn(2, 1, 12, 32)
        for empty in range(2):
            sharded, twin = copy.deepcopy(block), copy.deepcopy(block)
            for unit in units:
                unit = unit.replace("router", "gate")
                fully_shard(sharded.get_submodule(unit), mesh=mesh())
            root = fully_shard(torch.nn.Sequential(sharded), mesh=mesh())
            root(mine(x)[:, : 0 if dist.get_rank() == empty else 12]).square().sum().backward()
            twin(x[1 - empty]).square().sum().div(2).backward()
            ours, right = (
                {name: p.grad for name, p in each.named_parameters()} for each in (sharded, twin)
            )
            compare_gradients(ours, right, 1e-5)


def case_state_dict():
    """The full state dict is the stock model's, and goes back in."""
    whole = checkpoint.StateDictOptions(full_state_dict=True)
    for way in WAYS:
        stock, ids = hf_models.build("qwen3_moe"), batches()
        plain = prepared(way, stock)
        other = shard(prepared(way, hf_models.build("qwen3_moe")), ("experts",))
        checkpoint.set_model_state_dict(other, stock.state_dict(), options=whole)
        compare(step(other, mine(ids)), called(plain), ids)
        saved = checkpoint.get_model_state_dict(other, options=whole)
        twin = hf_models.build("qwen3_moe")
        twin.load_state_dict(saved)
        assert all(map(torch.equal, twin.state_dict().values(), stock.state_dict().values()))


def case_sharded_by_transformers():
    """from_pretrained(distributed_config=...): FSDP2 of all, or with experts on a mesh of their
    own, which it dispatches; replaced afterwards or not."""
    from transformers.distributed import DistributedConfig

    stock, ids = hf_models.build("qwen3_moe"), batches()
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    if dist.get_rank() == 0:
        stock.save_pretrained(folders[0])
    dist.barrier()
    logits, right = step(hf_models.exact(stock), ids.flatten(0, 1))
    for experts, way in itertools.product((1, 2), WAYS):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folders[0],
            distributed_config=DistributedConfig(fsdp_size=2, ep_size=experts),
            experts_implementation="sonicmoe_cpp",
        ).train()
        if way == "replaced":
            assert hf.replace_moe_blocks(model) == 2
        placements = model.model.layers[0].mlp.experts.gate_up_proj.placements
        assert len(placements) == experts
        ours, gradients = step(model, mine(ids))
        same(ours, mine(logits.chunk(2)), 1e-4)
        compare_gradients(gradients, right, 1e-4)


if __name__ == "__main__":
    ranks.main()
