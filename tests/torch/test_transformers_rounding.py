"""Token rounding in a block that calls its router and its experts."""

import copy

import pytest
import torch
from torch.nn.modules import module as torch_module

pytest.importorskip("transformers")

import sonicmoe_cpp.integrations.transformers as hf
from hf_models import (
    FAMILIES,
    build,
    compare,
    fused,
    moe_blocks,
    outputs,
    put,
    router_of,
    same,
    tokens,
)
from hf_situations import (
    experts_checkpointed,
    router_forward_on_the_instance,
    router_hook,
    router_of_a_subclass,
    router_parametrized,
    router_pre_hook,
    router_pruned,
    router_wrapped,
)


def rounding(model, **options):
    hf.replace_moe_blocks(model, router="token_rounding", tile=8, **options)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["nearest", "stochastic"])
def test_rounding_with_wrapped_experts_is_that_of_the_fused_layer(family, policy):
    stock, ids = build(family), tokens()
    results = []
    for wrap in (False, True):
        model = rounding(copy.deepcopy(stock), policy=policy, seed=4)
        if wrap:
            put(experts_checkpointed, model)
        assert all(fused(model)) is not wrap
        torch.manual_seed(5)
        out, grads = outputs(model, ids)
        grads = {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in grads.items()}
        results.append((out, grads, moe_blocks(model)))
    (out, grads, blocks), (called_out, called_grads, called_blocks) = results
    compare((called_out, called_grads), (out, grads))
    for fused_block, called in zip(blocks, called_blocks, strict=True):
        assert torch.equal(called.last_rows_per_expert, fused_block.last_rows_per_expert)
        before = called.last_rows_per_expert_before
        assert torch.equal(before, fused_block.last_rows_per_expert_before)
        assert not torch.equal(before, called.last_rows_per_expert)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_batch_below_the_tile_is_plain_top_k(wrap):
    stock = build("qwen3_moe")
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model, router="token_rounding", tile=8, policy="stochastic")
    if wrap:
        put(experts_checkpointed, model)
    ids = torch.randint(3, 64, (1, 7))
    same(model(ids).logits, stock(ids).logits)
    for block in moe_blocks(model):
        assert block.last_rows_per_expert.sum() == 7 * 3
        assert torch.equal(block.last_rows_per_expert_before, block.last_rows_per_expert)
    model(tokens())
    assert all((block.last_rows_per_expert % 8 == 0).all() for block in moe_blocks(model))


@pytest.mark.parametrize("situation", [router_pre_hook, router_parametrized, router_pruned])
def test_rounding_goes_by_the_logits_of_a_changed_router(situation):
    stock, ids = build("qwen3_moe", num_hidden_layers=1), tokens()
    model, twin = rounding(copy.deepcopy(stock)), rounding(copy.deepcopy(stock))
    put(situation, model)
    with torch.no_grad():  # the same change, written into the weight
        router = router_of(moe_blocks(twin)[0])
        changed = router_of(moe_blocks(model)[0])
        router.weight.copy_(changed.weight * (0.7 if situation is router_pre_hook else 1))
    same(model(ids).logits, twin(ids).logits)


@pytest.mark.parametrize(
    "situation",
    [router_hook, router_wrapped, router_forward_on_the_instance, router_of_a_subclass],
)
def test_rounding_refuses_a_router_whose_result_something_changes(situation):
    ids = tokens()
    model = build("qwen3_moe")
    put(situation, model)
    before = [type(block) for block in moe_blocks(model)]
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate: token_rounding: expected"):
        rounding(model)
    assert [type(block) for block in moe_blocks(model)] == before
    model = rounding(build("qwen3_moe"))
    put(situation, model)
    with pytest.raises(ValueError, match="gate: token_rounding: expected"):
        model(ids)
    model.eval()(ids)  # plain top-K


def test_rounding_refuses_global_forward_hooks():
    model = rounding(build("qwen3_moe"))
    handle = torch_module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        with pytest.raises(ValueError, match="global forward hook"):
            model(tokens())
    finally:
        handle.remove()
    model(tokens())
