"""The five families of transformers, small and random: its own eager blocks are the oracle."""

import copy

import pytest
import torch
import torch._dynamo.testing

transformers = pytest.importorskip("transformers")

import sonicmoe_cpp.integrations.transformers as hf
from hf_models import (
    FAMILIES,
    build,
    compare,
    exact,
    moe_blocks,
    outputs,
    put,
    router_of,
    same,
    tokens,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_backend(family):
    hf.register()
    model, ids = build(family), tokens()
    expected = outputs(model, ids)
    model.set_experts_implementation("sonicmoe_cpp")
    compare(outputs(model, ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_blocks(family):
    stock, ids = build(family), tokens()
    model = copy.deepcopy(stock)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    count = hf.replace_moe_blocks(model)
    assert count == (1 if family == "deepseek_v3" else 2)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert model.state_dict().keys() == stock.state_dict().keys()
    compare(outputs(model, ids), outputs(stock, ids))
    for block in (m for m in model.modules() if isinstance(m, hf.SonicMoEBlock)):
        assert block.last_rows_per_expert.sum() == ids.numel() * 3
        assert torch.equal(block.last_rows_per_expert, block.last_rows_per_expert_before)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "gpt_oss"])
def test_router_logits_and_auxiliary_loss(family):
    stock, ids = build(family, router_aux_loss_coef=0.5), tokens()
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model)
    ours = outputs(model, ids, output_router_logits=True)
    theirs = outputs(stock, ids, output_router_logits=True)
    assert len(ours[0].router_logits) == len(theirs[0].router_logits) == 2
    for a, b in zip(ours[0].router_logits, theirs[0].router_logits, strict=True):
        same(a, b)
    same(ours[0].aux_loss, theirs[0].aux_loss)
    compare(ours, theirs)


def test_router_logits_of_deepseek():
    """No auxiliary loss in this family, and one dense layer without a router."""
    stock, ids = build("deepseek_v3"), tokens()
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model)
    ours = outputs(model, ids, output_router_logits=True)
    theirs = outputs(stock, ids, output_router_logits=True)
    assert len(ours[0].router_logits) == len(theirs[0].router_logits) == 1
    assert ours[0].router_logits[0].dtype == torch.float32
    same(ours[0].router_logits[0], theirs[0].router_logits[0])
    compare(ours, theirs)


def test_bfloat16():
    """Against the same weights in float32: a token's logits are no further away than the stock
    model's in bfloat16. The median, since rounding makes any of the three models choose another
    expert of near-equal score for a few tokens."""
    hf.register()
    stock, ids = build("qwen3_moe", num_hidden_layers=1).bfloat16(), tokens()
    exact = copy.deepcopy(stock).float()
    backend, replaced = copy.deepcopy(stock), copy.deepcopy(stock)
    backend.set_experts_implementation("sonicmoe_cpp")
    hf.replace_moe_blocks(replaced)
    expected, expected_grads = outputs(exact, ids)
    results = [outputs(model, ids) for model in (stock, backend, replaced)]

    def errors(ours):
        return (ours.float() - expected.logits).norm(dim=-1) / expected.logits.norm(dim=-1)

    reference, *medians = (errors(out.logits).median().item() for out, _ in results)
    assert max(medians) < 1.25 * reference < 0.05
    for _, grads in results[1:]:
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            assert grad.dtype == torch.bfloat16
            assert (grad.float() - expected_grads[name]).norm() < 0.2 * expected_grads[name].norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_load_in_stock_transformers(family, tmp_path):
    model, ids = build(family).eval(), tokens()
    hf.replace_moe_blocks(model)
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager"
    )
    assert not any(isinstance(m, hf.SonicMoEBlock) for m in stock.modules())
    with torch.no_grad():
        same(model(ids).logits, stock.eval()(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_rounding(family):
    stock, ids = build(family), tokens()
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model, router="token_rounding", tile=8, policy="stochastic", seed=3)
    outputs(model, ids)
    for block in (m for m in model.modules() if isinstance(m, hf.SonicMoEBlock)):
        after, before = block.last_rows_per_expert, block.last_rows_per_expert_before
        assert (after % 8 == 0).all() and ((after - before).abs() < 8).all()
        assert before.sum() == ids.numel() * 3
    with torch.no_grad():
        same(model.eval()(ids).logits, stock.eval()(ids).logits)


def test_gradient_checkpointing_and_deepcopy():
    model, ids = build("qwen3_moe"), tokens()
    hf.replace_moe_blocks(model, router="token_rounding", tile=8, policy="stochastic")
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    results = []
    for each in (model, twin):
        torch.manual_seed(5)
        results.append(outputs(each, ids))
    assert torch.equal(results[0][0].logits, results[1][0].logits)
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_selection_bias_in_another_dtype(dtype):
    """model.to(dtype) casts the buffer with the weights; what is left of it selects."""
    stock, ids = build("deepseek_v3"), tokens()
    without = exact(stock)
    for block in moe_blocks(stock):
        bias = block.gate.e_score_correction_bias
        bias.copy_(torch.randn(8))
        block.gate.e_score_correction_bias = bias.to(dtype)
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model)
    expected = outputs(exact(stock), ids)
    compare(outputs(model, ids), expected)
    assert all(block.gate.e_score_correction_bias.dtype == dtype for block in moe_blocks(model))
    assert (expected[0].logits - without(ids).logits).abs().max() > 1e-2


def test_a_bfloat16_checkpoint_of_deepseek(tmp_path):
    """Loading keeps the selection bias in float32, .bfloat16() does not; both work."""
    stock, ids = build("deepseek_v3", num_hidden_layers=2).eval(), tokens()
    stock.save_pretrained(tmp_path)
    loaded = type(stock).from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
    )
    cast = copy.deepcopy(loaded).bfloat16()
    for model, dtype in ((loaded, torch.float32), (cast, torch.bfloat16)):
        twin = copy.deepcopy(model)
        twin.set_experts_implementation("eager")
        hf.replace_moe_blocks(model)
        assert moe_blocks(model)[0].gate.e_score_correction_bias.dtype == dtype
        with torch.no_grad():
            right = exact(twin)(ids).logits
            errors = [(m(ids).logits.double() - right).norm(dim=-1) for m in (model, twin)]
        ours, theirs = (error.median() / right.norm(dim=-1).median() for error in errors)
        assert ours < 1.25 * theirs < 0.05


@pytest.mark.parametrize("hooked", [False, True])
def test_settings_are_read_at_every_forward(hooked):
    stock, ids = build("deepseek_v3"), tokens()
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model)
    results = []
    for name, value in (("routed_scaling_factor", 0.5), ("norm_topk_prob", False), ("top_k", 2)):
        for block in (*moe_blocks(model), *moe_blocks(stock)):
            assert getattr(block.gate, name) != value
            setattr(block.gate, name, value)
        if hooked:
            put(router_hook_that_keeps_all, model)
        results.append(outputs(exact(stock), ids))
        compare(outputs(model, ids), results[-1])
        assert moe_blocks(model)[0].last_rows_per_expert.sum() == ids.numel() * block.gate.top_k
    assert (results[0][0].logits - results[1][0].logits).abs().max() > 1e-3


def router_hook_that_keeps_all(block):
    router_of(block).register_forward_hook(lambda module, inputs, output: None)


@pytest.mark.parametrize("hooked", [False, True])
def test_jitter_noise_is_that_of_the_stock_block(hooked):
    stock, ids = build("mixtral", router_jitter_noise=0.3), tokens()
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model)
    if hooked:
        put(router_hook_that_keeps_all, model)
    results = []
    for each in (model, stock):
        torch.manual_seed(5)
        results.append(outputs(each, ids))
    compare(*results)
    with torch.no_grad():
        assert (stock.eval()(ids).logits - results[1][0].logits).abs().max() > 1e-2


def test_replaced_again_with_other_options():
    model, ids = build("qwen3_moe"), tokens()
    assert hf.replace_moe_blocks(model) == hf.replace_moe_blocks(model, "token_rounding", 8) == 2
    outputs(model, ids)
    assert all((b.last_rows_per_expert % 8 == 0).all() for b in moe_blocks(model))
    assert "router=token_rounding, tile=8" in repr(model)
    hf.replace_moe_blocks(model)
    outputs(model, ids)
    assert all(b.last_rows_per_expert.sum() == ids.numel() * 3 for b in moe_blocks(model))


def test_a_block_alone_and_a_block_of_a_subclass():
    for subclass in (False, True):
        block = moe_blocks(build("olmoe"))[0]
        right, stock = exact(block), type(block)
        if subclass:
            block.__class__ = type("Mine", (stock,), {})
        assert hf.replace_moe_blocks(block) == 1
        assert isinstance(block, stock) and isinstance(block, hf.SonicMoEBlock)
        x = torch.randn(2, 8, 32)
        same(block(x), right(x.double()))


def test_layers_share_one_compiled_graph():
    model = build("qwen3_moe")
    hf.replace_moe_blocks(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    x = torch.randn(2, 8, model.config.hidden_size)
    for layer in model.model.layers:
        torch.compile(layer.mlp, backend=counter)(x)
    assert len(model.model.layers) > 1 and counter.frame_count == 1
