"""Experts of transformers' models over the ranks of a group, against one process with all batches:
the expert parallelism of transformers by this library, and parallelize_experts."""

import contextlib
import copy
import functools
import tempfile

import hf_models
import pytest
import ranks
import sonicmoe_cpp.integrations.transformers as hf
import torch
import torch.distributed as dist
import transformers
from comparison import compare_gradients, full, mean_of, same
from sonicmoe_cpp import distributed as smd
from sonicmoe_cpp.distributed import exchange
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed import DistributedConfig

hf.register()
BACKEND = "sonicmoe_cpp"
FAMILIES = (
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
)  # the second has shared experts, the third biases


@functools.cache
def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def batches(tokens=12):
    return torch.randint(3, 64, (dist.get_world_size(), 2, tokens))


def mine(x):
    return x[dist.get_rank()]


def step(model, ids):
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return full(out.logits.detach()), {name: p.grad for name, p in model.named_parameters()}


@functools.cache
def saved(family):
    """A stock model, and its folder, the same of all ranks."""
    torch.manual_seed(0)
    model = hf_models.build(family)
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    if dist.get_rank() == 0:
        model.save_pretrained(folders[0])
    dist.barrier()
    return model, folders[0]


def loaded(family, experts_implementation=BACKEND, ep_implementation=BACKEND, **sizes):
    config = DistributedConfig(ep_implementation=ep_implementation, **sizes)
    return transformers.AutoModelForCausalLM.from_pretrained(
        saved(family)[1], distributed_config=config, attn_implementation="eager",
        experts_implementation=experts_implementation,
    ).train()  # fmt: skip


@contextlib.contextmanager
def watched():
    """The numbers of tokens that the operator of the experts gets."""
    rows, original = [], exchange.functional.moe

    def counted(x, *arguments, **options):
        rows.append(x.shape[0])
        return original(x, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange.functional, "moe", counted)
        yield rows


def case_ranks_with_batches_of_their_own():
    """fsdp x ep: y, every gradient; a token crosses once, whatever K is."""
    world, ids = dist.get_world_size(), batches()
    for family in FAMILIES:
        stock, _ = saved(family)
        logits, right = step(hf_models.exact(stock), ids.flatten(0, 1))
        model = loaded(family, fsdp_size=world, ep_size=world)
        with watched() as rows:
            ours, gradients = step(model, mine(ids))
        assert rows and set(rows) == {ids.numel()}
        same(ours, mine(logits.chunk(world)), 1e-4)
        compare_gradients(gradients, right, 1e-4)


def case_ranks_that_share_a_batch():
    """tp x ep, with fewer tokens than a multiple of the ranks, and in inference."""
    world = dist.get_world_size()
    for family in FAMILIES[:2]:
        stock, _ = saved(family)
        ids = batches(13)[0][:1]
        logits, right = step(hf_models.exact(stock), ids)
        model = loaded(family, tp_size=world, ep_size=world)
        ours, gradients = step(model, ids)
        same(ours, logits, 1e-4)
        compare_gradients(gradients, right, 1e-4)
        with torch.no_grad():
            same(full(model(ids).logits), logits, 1e-4)


def case_other_numbers_of_tokens_on_each_rank():
    world, rank = dist.get_world_size(), dist.get_rank()
    stock, _ = saved("qwen3_moe")
    parts = [batch[:, : 5 + 3 * index] for index, batch in enumerate(batches(5 + 3 * world))]
    model = loaded("qwen3_moe", fsdp_size=world, ep_size=world)
    ours, gradients = step(model, parts[rank])
    exact = hf_models.exact(stock)
    results = [step(copy.deepcopy(exact), part) for part in parts]
    same(ours, results[rank][0], 1e-4)
    compare_gradients(gradients, mean_of([each for _, each in results]), 1e-4)


def case_options_of_the_exchange():
    """A capacity that is far too small: rows are dropped, and an error says how many."""
    hf.register_expert_parallel("narrow", row_capacity=1e-3, on_overflow="raise")
    sizes = {"fsdp_size": dist.get_world_size(), "ep_size": dist.get_world_size()}
    model = loaded("qwen3_moe", ep_implementation="narrow", **sizes)
    with pytest.raises(RuntimeError, match="row_capacity: expected room for .* got 128 rows"):
        model(mine(batches(120)))


def case_replaced_blocks_of_a_model_spread_by_transformers():
    world, ids = dist.get_world_size(), batches()
    stock, _ = saved("qwen3_moe")
    logits, right = step(hf_models.exact(stock), ids.flatten(0, 1))
    model = loaded("qwen3_moe", fsdp_size=world, ep_size=world)
    assert hf.replace_moe_blocks(model) == 2
    ours, gradients = step(model, mine(ids))
    same(ours, mine(logits.chunk(world)), 1e-4)
    compare_gradients(gradients, right, 1e-4)


def case_another_experts_implementation_is_refused():
    with pytest.raises(RuntimeError, match="experts_implementation: expected 'sonicmoe_cpp' with"):
        loaded("qwen3_moe", "grouped_mm", fsdp_size=dist.get_world_size(),
               ep_size=dist.get_world_size())  # fmt: skip


# ------------------------------------------------------------------------------ parallelize_experts


def spread(model, ways, **options):
    """A copy whose experts are spread, as modules or with their replaced blocks."""
    model = copy.deepcopy(model)
    if ways == "replaced":
        hf.replace_moe_blocks(model)
    for block in hf_models.moe_blocks(model):
        module = block if ways == "replaced" else block.experts
        assert smd.parallelize_experts(module, mesh(), **options) is module
    return model


def mean(gradients):
    """Of what is whole on every rank; sums of what is spread are over all batches already."""
    world = dist.get_world_size()
    for name, grad in gradients.items():
        grad = full(grad).clone()
        if "experts." not in name or "shared" in name:
            dist.all_reduce(grad)
        gradients[name] = grad / world
    return gradients


def case_parallelize_experts():
    world, ids = dist.get_world_size(), batches()
    for family in FAMILIES:
        stock = saved(family)[0]
        logits, right = step(hf_models.exact(stock), ids.flatten(0, 1))
        for ways in ("replaced", "experts"):
            model = spread(stock, ways)
            ours, gradients = step(model, mine(ids))
            same(ours, mine(logits.chunk(world)), 1e-4)
            compare_gradients(mean(gradients), right, 1e-4)
            assert stock.config._experts_implementation == "eager"
            for block in hf_models.moe_blocks(model):
                first = next(block.experts.parameters())
                assert first.to_local().shape[0] * world == first.shape[0]


def case_a_replaced_block_rounds_its_own_tokens():
    stock = saved("qwen3_moe")[0]
    block = hf_models.moe_blocks(copy.deepcopy(stock))[0]
    holder = torch.nn.ModuleList([block])
    hf.replace_moe_blocks(holder, router="token_rounding", tile=4)
    whole = copy.deepcopy(block)
    smd.parallelize_experts(block, mesh())
    x = torch.randn(dist.get_world_size(), 1, 24, 32)
    same(block(mine(x)), whole(mine(x)), 1e-5)
    assert torch.equal(block.last_rows_per_expert, whole.last_rows_per_expert)
    assert (block.last_rows_per_expert % 4 == 0).all()


def case_refusals_leave_a_model_whole():
    model = copy.deepcopy(saved("qwen3_moe")[0])
    block = hf_models.moe_blocks(model)[0]
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="module: expected .* got Qwen3MoeSparseMoeBlock"):
        smd.parallelize_experts(block, mesh())
    act = block.experts.act_fn
    block.experts.act_fn = torch.nn.Tanh()
    with pytest.raises(ValueError, match="Qwen3MoeExperts.act_fn: expected one of"):
        smd.parallelize_experts(block.experts, mesh())
    block.experts.act_fn = act
    block.experts.scale = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match="Qwen3MoeExperts: expected parameters"):
        smd.parallelize_experts(block.experts, mesh())
    del block.experts.scale
    assert all(p is before[name] for name, p in model.named_parameters())
    smd.parallelize_experts(block.experts, mesh())
    with pytest.raises(RuntimeError, match="module: expected experts that are whole"):
        smd.parallelize_experts(block.experts, mesh())


if __name__ == "__main__":
    ranks.main()
