"""Whatever acts on the calls of a router or of experts acts in a replaced block as in the stock
one.

Each situation is put on the stock model in float64, which is the oracle, and on the replaced model:
before the replacement, after it, and between two forwards.
"""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch.nn.modules import module as torch_module

pytest.importorskip("transformers")

import sonicmoe_cpp.integrations.transformers as hf
from hf_models import (
    FAMILIES,
    build,
    compare,
    exact,
    fused,
    moe_blocks,
    outputs,
    put,
    router_of,
    same,
    tokens,
)
from hf_situations import (
    SAME_LOGITS,
    SITUATIONS,
    experts_hook,
    experts_wrapped,
    other_experts,
    router_forward_on_the_instance,
    router_hook,
    router_hook_in_place,
    router_of_a_subclass,
    router_pre_hook,
)


def check(situation, stock, ids):
    right = exact(stock)
    put(situation, right)
    expected = outputs(right, ids)
    unchanged = outputs(exact(stock), ids)
    difference = (expected[0].logits - unchanged[0].logits).abs().max()
    assert (difference > 1e-2) == (situation not in SAME_LOGITS)
    for moment in ("before", "after", "between"):
        model = copy.deepcopy(stock)
        if moment == "before":
            put(situation, model)
        hf.replace_moe_blocks(model)
        if moment == "between":
            assert all(fused(model))
            outputs(model, ids)
        undo = [] if moment == "before" else put(situation, model)
        assert not any(fused(model))
        compare(outputs(model, ids), expected)
        for block in moe_blocks(model):
            assert block.last_rows_per_expert.sum() == ids.numel() * 3
        if undo and undo[0] is not None:
            for take_back in undo:
                take_back()
            assert all(fused(model))
            compare(outputs(model, ids), unchanged)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(situation):
    check(situation, build("qwen3_moe"), tokens())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_moe"])
@pytest.mark.parametrize("situation", [router_hook, experts_wrapped])
def test_families(family, situation):
    check(situation, build(family), tokens())


def test_a_router_result_changed_in_place():
    stock, ids = build("mixtral"), tokens()
    model, right = copy.deepcopy(stock), exact(stock)
    hf.replace_moe_blocks(model)
    put(router_hook_in_place, model)
    with torch.no_grad():
        plain = right(ids).logits
        put(router_hook_in_place, right)
        expected = right(ids).logits
        assert (expected - plain).abs().max() > 1e-2
        same(model(ids).logits, expected)


GLOBAL_HOOKS = {
    "forward": (
        torch_module.register_module_forward_hook,
        lambda m, inputs, out: other_experts(m, inputs, out) if hasattr(m, "top_k") else None,
    ),
    "forward_pre": (
        torch_module.register_module_forward_pre_hook,
        lambda m, inputs: (inputs[0] * 0.7,) if hasattr(m, "top_k") else None,
    ),
    "backward": (
        torch_module.register_module_full_backward_hook,
        lambda m, grads, _: (grads[0] * 3,) if hasattr(m, "top_k") else None,
    ),
    "backward_pre": (
        torch_module.register_module_full_backward_pre_hook,
        lambda m, grads: (grads[0] * 3,) if hasattr(m, "down_proj_bias") else None,
    ),
}


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_global_module_hooks(kind):
    stock, ids = build("gpt_oss"), tokens()
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model)
    unchanged = outputs(exact(stock), ids)
    register, hook = GLOBAL_HOOKS[kind]
    handle = register(hook)
    try:
        assert not any(fused(model))
        expected = outputs(exact(stock), ids)
        compare(outputs(model, ids), expected)
    finally:
        handle.remove()
    with pytest.raises(AssertionError):
        compare(expected, unchanged)
    assert all(fused(model))


def test_hooks_of_the_block_itself_stay():
    stock, ids = build("deepseek_v3"), tokens()
    for block in moe_blocks(stock):
        block.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
        block.register_forward_hook(lambda module, inputs, y: 2 * y)
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model)
    assert all(fused(model))
    compare(outputs(model, ids), outputs(exact(stock), ids))


# -------------------------------------------------------------------------------------- observers


def test_an_observer_keeps_the_fused_layer():
    stock, ids = build("qwen3_moe"), tokens()
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model)

    @hf.observer
    def keep(module, inputs, output):
        module.kept = output[0]

    for each in (*moe_blocks(model), *moe_blocks(stock)):
        router_of(each).register_forward_hook(keep)
    assert all(fused(model))
    compare(outputs(model, ids), outputs(exact(stock), ids))
    outputs(stock, ids)
    for ours, theirs in zip(moe_blocks(model), moe_blocks(stock), strict=True):
        same(router_of(ours).kept, router_of(theirs).kept)


def test_an_observer_that_returns_something_is_refused():
    model = build("qwen3_moe")
    hf.replace_moe_blocks(model)
    router = router_of(moe_blocks(model)[0])
    router.register_forward_hook(hf.observer(lambda module, inputs, output: (output[0] + 1, None)))
    with pytest.raises(ValueError, match="expected None from an observer"):
        model(tokens())
    with pytest.raises(TypeError, match="observer: hook"):
        hf.observer(len)


def test_recorded_router_logits_keep_the_fused_layer():
    stock, ids = build("gpt_oss"), tokens()
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model)
    for _ in range(2):
        ours = model(ids, output_router_logits=True)
        assert all(router_of(block)._forward_hooks for block in moe_blocks(model))
        assert all(fused(model))
    theirs = exact(stock)(ids, output_router_logits=True)
    for a, b in zip(ours.router_logits, theirs.router_logits, strict=True):
        same(a, b)


def test_recorded_router_logits_of_a_hooked_router():
    stock, ids = build("qwen3_moe"), tokens()
    model, right = copy.deepcopy(stock), exact(stock)
    hf.replace_moe_blocks(model)
    for each in (model, right):
        put(router_hook, each)
    ours, theirs = (outputs(each, ids, output_router_logits=True) for each in (model, right))
    compare(ours, theirs)
    for a, b in zip(ours[0].router_logits, theirs[0].router_logits, strict=True):
        same(a, b)


# ---------------------------------------------------------------------- copies, pickles, compiling


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(copied):
    stock, ids = build("gpt_oss"), tokens()
    model = copy.deepcopy(stock)
    hf.replace_moe_blocks(model)
    for block in moe_blocks(model):
        router_of(block).register_forward_hook(other_experts)
    right = exact(stock)
    put(router_hook, right)
    twin = copied(model)
    assert all(isinstance(block, hf.SonicMoEBlock) for block in moe_blocks(twin))
    assert not any(fused(twin))
    compare(outputs(twin, ids), outputs(right, ids))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    for block in moe_blocks(twin):
        router_of(block)._forward_hooks.clear()
    assert all(fused(twin)) and not any(fused(model))
    compare(outputs(twin, ids), outputs(exact(stock), ids))


@pytest.mark.parametrize(
    "router, situation",
    [
        ("topk", None),
        ("topk", router_hook),
        ("topk", experts_hook),
        ("token_rounding", None),
        ("token_rounding", experts_hook),
        ("token_rounding", router_pre_hook),
    ],
)
def test_compiled_without_a_break(router, situation):
    model = build("qwen3_moe")
    hf.replace_moe_blocks(model, router=router, tile=8)
    if situation is not None:
        put(situation, model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    x = torch.randn(2, 8, model.config.hidden_size)
    for block in moe_blocks(model):
        compiled = torch.compile(block, backend=counter, fullgraph=True)
        same(compiled(x), block(x), tolerance=1e-6)
    if situation is None:
        assert counter.frame_count == 1  # one graph for all layers


@pytest.mark.parametrize("situation", [router_forward_on_the_instance, router_of_a_subclass])
def test_what_changes_after_compiling_is_seen(situation):
    model = build("qwen3_moe")
    hf.replace_moe_blocks(model)
    block, x = moe_blocks(model)[0], torch.randn(2, 8, model.config.hidden_size)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    before = compiled(x)
    situation(block)
    after = compiled(x)
    same(after, block(x), tolerance=1e-6)
    assert (after - before).abs().max() > 1e-2


def test_a_compiled_block_is_replaced():
    stock = build("mixtral")
    x = torch.randn(2, 8, stock.config.hidden_size)
    torch._dynamo.reset()
    model = copy.deepcopy(stock)
    for layer in model.model.layers:
        layer.mlp = torch.compile(layer.mlp, backend="eager")
        layer.mlp(x)
    assert hf.replace_moe_blocks(model) == 2
    for layer, right in zip(model.model.layers, exact(stock).model.layers, strict=True):
        same(layer.mlp(x), right.mlp(x.double()))
        assert isinstance(layer.mlp._orig_mod, hf.SonicMoEBlock)
        assert layer.mlp._orig_mod.last_rows_per_expert.sum() == 2 * 8 * 3
