"""Blocks of transformers as layers of this library, by module and by state dict."""

import copy

import hf_models
import pytest
import sonicmoe_cpp as sm
import torch
from safetensors.torch import load_file
from sonicmoe_cpp import convert

transformers = pytest.importorskip("transformers")

import sonicmoe_cpp.integrations.transformers as hf

MEMORY = {family: "transformers" for family in hf_models.FAMILIES} | {"gpt_oss": "gpt-oss"}
FILES = {"qwen3_moe": "transformers-list", "olmoe": "transformers-list", "mixtral": "mixtral",
         "gpt_oss": "gpt-oss", "deepseek_v3": "transformers-list"}  # fmt: skip
SHARED = ("shared_experts.",)


def block_and_input(family):
    block = hf_models.moe_blocks(hf_models.build(family))[0].eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block, torch.randn(2, 5, 32)


def routed(block, x):
    """What the stock block computes, without what other experts add."""
    y = block(x)
    y = y[0] if isinstance(y, tuple) else y
    return y - block.shared_experts(x) if hasattr(block, "shared_experts") else y


@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_a_block_becomes_a_layer(family):
    block, x = block_and_input(family)
    before = copy.deepcopy(block.state_dict())
    layer = hf.to_moe(block)
    assert type(layer) is sm.MoE and not layer.training
    hf_models.same(layer(x), routed(block, x))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(torch.equal(block.state_dict()[key], before[key]) for key in before)


@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_a_state_dict_becomes_a_layer_and_comes_back(family):
    block, x = block_and_input(family)
    layer = copy.deepcopy(hf.to_moe(block))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    made = convert.import_state_dict(layer, block.state_dict(), MEMORY[family], ignore=SHARED)
    layer.load_state_dict(made)
    hf_models.same(layer(x), routed(block, x))
    back = convert.export_state_dict(layer, MEMORY[family])
    missing = block.load_state_dict(back, strict=False)
    assert all(key.startswith(SHARED) for key in missing.missing_keys)
    assert not missing.unexpected_keys
    assert all(torch.equal(block.state_dict()[key], back[key]) for key in back)


@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_a_file_of_transformers_becomes_a_layer(family, tmp_path):
    """save_pretrained writes what the hub has."""
    model = hf_models.build(family).eval()
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    (router,) = [key for key in file if key.startswith("model.layers.1.") and ".experts." not in key
                 and key.endswith(("gate.weight", "router.weight"))]  # fmt: skip
    prefix = router.removesuffix("gate.weight").removesuffix("router.weight")
    block = hf_models.moe_blocks(model)[-1]
    layer = hf.to_moe(block)
    expected = copy.deepcopy(layer.state_dict())
    made = convert.import_state_dict(layer, file, FILES[family], prefix, ignore=SHARED)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], expected[key]) for key in expected)
    back = convert.export_state_dict(layer, FILES[family], prefix)
    assert back.keys() == {
        key for key in file if key.startswith(prefix) and "shared_experts" not in key
    }
    assert all(torch.equal(back[key], file[key]) for key in back)


def test_a_replaced_block_becomes_a_layer_too():
    model = hf_models.build("olmoe").eval()
    block, x = hf_models.moe_blocks(model)[0], torch.randn(2, 5, 32)
    expected = block(x)
    hf.replace_moe_blocks(model)
    hf_models.same(hf.to_moe(block)(x), expected)


def test_blocks_that_cannot_be_a_layer_are_named():
    block, _ = block_and_input("mixtral")
    block.jitter_noise = 0.1
    with pytest.raises(
        ValueError, match=r"to_moe: MixtralSparseMoeBlock\.jitter_noise: .* got 0.1"
    ):
        hf.to_moe(block)
    block, _ = block_and_input("qwen3_moe")
    block.gate.bfloat16()
    with pytest.raises(ValueError, match=r"plain tensors of one dtype.*router\.weight.*bfloat16"):
        hf.to_moe(block)
    with pytest.raises(ValueError, match=r"to_moe: Linear: expected a sparse MoE block"):
        hf.to_moe(torch.nn.Linear(3, 3))
