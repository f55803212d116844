"""What replace_moe_blocks and its blocks refuse: by name, and with the model left as it was."""

import copy
import functools
import importlib
import sys

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import sonicmoe_cpp.integrations.transformers as hf
from hf_models import build, compare, exact, fused, moe_blocks, outputs, router_name, same, tokens


def state(model):
    """Everything of a model that a replacement touches."""
    return [
        (name, type(module), sorted(vars(module)), id(getattr(module, "config", None)))
        for name, module in model.named_modules()
    ] + [(name, id(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())]


def refused(model, match, **options):
    before, implementation = state(model), model.config._experts_implementation
    with pytest.raises(ValueError, match=match):
        hf.replace_moe_blocks(model, **options)
    assert state(model) == before
    assert model.config._experts_implementation == implementation


def second(model):
    return moe_blocks(model)[1]


class Quantised(nn.Module):
    """Experts without the interface."""


def test_a_refusal_names_the_block_and_changes_nothing():
    model = build("gpt_oss")
    second(model).experts.alpha = 1.5
    refused(model, r"model\.layers\.1\.mlp\.experts\.alpha .*expected 1\.702, got 1\.5")
    model = build("qwen3_moe")
    second(model).experts.act_fn = nn.Tanh()
    refused(model, r"model\.layers\.1\.mlp\.experts\.act_fn: expected .* got the activation Tanh")
    for name, wanted in (("experts", "Qwen3MoeExperts"), ("gate", "Qwen3MoeTopKRouter")):
        model = build("qwen3_moe")
        setattr(second(model), name, Quantised())
        refused(model, rf"layers\.1\.mlp\.{name}: expected {wanted} or a wrapper.*got Quantised")
    model = build("qwen3_moe")
    second(model).experts.has_post_expert_norm = True
    refused(model, r"layers\.1\.mlp\.experts\.post_expert_norm: expected none")
    del second(model).experts.has_post_expert_norm
    ids = tokens()
    model.config._experts_implementation = "eager"
    compare(outputs(model, ids), outputs(exact(model), ids))


def test_options():
    model = build("qwen3_moe")
    for options, match in (
        ({"router": "hash"}, "router: expected one of topk, token_rounding, got 'hash'"),
        ({"policy": "sideways"}, "policy: expected one of .*, got 'sideways'"),
        ({"tile": 0}, "tile: expected an integer in 1 .. .*, got 0"),
        ({"tile": 2.0}, "tile: expected an integer in 1 .. .*, got 2.0"),
        ({"seed": -1}, "seed: expected an integer in .*, got -1"),
        ({"seed": 2**62}, "seed: expected an integer in"),
    ):
        refused(model, match, **options)
    for nothing in (nn.Linear(2, 2), build("qwen3_moe", mlp_only_layers=[0, 1])):
        with pytest.raises(ValueError, match="has no block of Qwen3MoeSparseMoeBlock"):
            hf.replace_moe_blocks(nothing)


def test_a_subclass_with_a_forward_of_its_own():
    model = build("mixtral")
    stock = type(second(model))

    class Residual(stock):
        def forward(self, x):
            return x + super().forward(x)

    second(model).__class__ = Residual
    refused(model, r"layers\.1\.mlp: Residual\.forward: expected the forward of MixtralSparseMoeBl")


def test_a_forward_on_the_instance():
    model, ids = build("qwen3_moe"), tokens()
    block = second(model)
    stock = block.forward

    def doubled(x):
        return 2 * stock(x)

    block.forward = doubled
    refused(model, r"layers\.1\.mlp\.forward: expected the forward of Qwen3MoeSparseMoeBlock")
    # The other way round works: it wraps the replacement.
    del block.forward
    right = exact(model)
    hf.replace_moe_blocks(model)
    ours, theirs = second(model), second(right)
    for each in (ours, theirs):
        inner = each.forward
        each.forward = functools.partial(lambda inner, x: 2 * inner(x), inner)
    compare(outputs(model, ids), outputs(right, ids))


@pytest.mark.parametrize("part", ["router", "experts"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_patched_class_is_called(part, moment, monkeypatch):
    """As libraries do that put their own forward into the classes of transformers."""
    stock, ids = build("olmoe"), tokens()
    block = moe_blocks(stock)[0]
    cls = type(getattr(block, router_name(block) if part == "router" else "experts"))
    inner = cls.forward
    unchanged = exact(stock)(ids).logits

    @functools.wraps(inner)
    def patched(self, *inputs):
        out = inner(self, *inputs)
        return (out[0], out[1] * 0.5, out[2]) if part == "router" else 2 * out

    model = copy.deepcopy(stock)
    if moment == "after":
        hf.replace_moe_blocks(model)
        assert all(fused(model))
    monkeypatch.setattr(cls, "forward", patched)
    expected = exact(stock)(ids).logits
    assert (expected - unchanged).abs().max() > 1e-2
    if moment == "before":
        hf.replace_moe_blocks(model)
    assert not any(fused(model))
    same(model(ids).logits, expected)


def test_a_patched_block_class_is_refused(monkeypatch):
    replaced, model = build("olmoe"), build("olmoe")
    hf.replace_moe_blocks(replaced)
    cls = type(moe_blocks(model)[0])
    inner = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: 2 * inner(self, x))
    refused(model, r"layers\.0\.mlp: OlmoeSparseMoeBlock\.forward: expected")
    with pytest.raises(ValueError, match="OlmoeSparseMoeBlock.forward: expected"):
        replaced(tokens())


def test_a_class_patched_before_the_integration_was_imported(monkeypatch):
    from sonicmoe_cpp.integrations.transformers import families

    olmoe = importlib.import_module("transformers.models.olmoe.modeling_olmoe")
    for name in ("OlmoeSparseMoeBlock", "OlmoeTopKRouter", "OlmoeExperts"):
        cls = getattr(olmoe, name)
        inner = cls.forward
        with monkeypatch.context() as patch:
            patch.setattr(
                cls, "forward", functools.wraps(inner)(lambda *inputs, inner=inner: inner(*inputs))
            )
            late = families.Family(
                olmoe.OlmoeSparseMoeBlock,
                olmoe.OlmoeTopKRouter,
                olmoe.OlmoeExperts,
                "gate",
                "softmax_topk",
            )
            block = moe_blocks(build("olmoe"))[0]
            with pytest.raises(
                ValueError, match=f"mlp: {name}.forward: expected transformers' own"
            ):
                families.check_block(block, type(block), late, "mlp", False)


def test_versions(monkeypatch):
    # Not the module imported above: transformers may have put another in its place since.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.6.2")
    with pytest.raises(ImportError, match="transformers: expected version 5.7 or later, got 5.6.2"):
        importlib.reload(hf)
    monkeypatch.undo()
    importlib.reload(hf)
    model = build("deepseek_v3")
    del moe_blocks(model)[0].gate.top_k  # as in versions whose router returns logits alone
    refused(model, r"layers\.1\.mlp\.gate: expected a router that returns weights and ids.*update")


def test_more_than_one_way_to_hold_a_block():
    """The same block twice in a model is replaced once; a ModuleList and a bare attribute alike."""
    block = moe_blocks(build("qwen3_moe"))[0]
    holder = nn.ModuleDict({"list": nn.ModuleList([block]), "again": block})
    assert hf.replace_moe_blocks(holder) == 1
    assert holder["list"][0] is holder["again"] is block and isinstance(block, hf.SonicMoEBlock)
    assert torch.isfinite(holder["again"](torch.randn(1, 4, 32))).all()
