"""torchtitan's debug models with its routed experts replaced, where torchtitan is installed:

    pip install torchtitan==0.3.0 triton && python -m pytest tests/torch/test_torchtitan.py

Its attention has no backward on CPUs: an override of the same kind takes another one.
"""

import functools
import importlib

import pytest
import torch

pytest.importorskip("torchtitan", "0.3")
pytest.importorskip("triton")

from torchtitan.config.override import OverrideConfig, apply_overrides, override
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

OURS = "sonicmoe_cpp.integrations.torchtitan.routed_experts"
FAMILIES = {"qwen3": "debugmodel_moe", "deepseek_v3": "debugmodel"}  # the second: shared experts


@override(target=FlexAttention.Config)
def attention_of_cpus(config):
    return ScaledDotProductAttention.Config()


def build(family, *imports):
    registry = importlib.import_module(f"torchtitan.models.{family}").model_registry
    config = registry(FAMILIES[family]).model
    config.layers = config.layers[:2]
    imports = [f"{__name__}.attention_of_cpus", *imports]
    apply_overrides(OverrideConfig(imports=imports), config)
    torch.manual_seed(0)
    model = config.build()
    model.init_states()
    return model


@functools.cache
def stock(family):
    return build(family)


def step(model, ids):
    model.zero_grad()
    logits = model(ids[:, :-1], positions=torch.arange(ids.shape[1] - 1).expand(ids.shape[0], -1))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), logits.detach()


def gradients(model):
    """By torchtitan's names."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.endswith("w13"):
            gate, up = parameter.grad.unbind(2)
            found |= {name.replace("w13", "w1_EFD"): gate, name.replace("w13", "w3_EFD"): up}
        else:
            found[name] = parameter.grad
    return found


def same(ours, theirs, tolerance=0.05):
    """Within what two ways of rounding to bfloat16 leave; zeros and a dropped half are further."""
    assert ours.shape == theirs.shape and theirs.norm() > 0
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.fixture(autouse=True)
def ids():
    return torch.randint(0, 2048, (2, 49))


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_torchtitan(family, ids):
    theirs, ours = stock(family), build(family, OURS)
    assert sum(type(m).__name__ == "SonicRoutedExperts" for m in ours.modules()) == sum(
        isinstance(m, MoE) for m in theirs.modules()
    )
    ours.load_state_dict(theirs.state_dict())
    right, mine = step(theirs, ids), step(ours, ids)
    same(mine[1], right[1])
    right, mine = gradients(theirs), gradients(ours)
    assert right.keys() == mine.keys()
    for name, gradient in right.items():
        if gradient.norm() > 0:
            same(mine[name], gradient)


def test_checkpoints_have_the_names_of_torchtitan():
    theirs, ours = stock("qwen3").state_dict(), build("qwen3", OURS)
    assert ours.state_dict().keys() == theirs.keys()
    ours.load_state_dict(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
    w13 = {name: parameter + 1 for name, parameter in ours.named_parameters() if "w13" in name}
    ours.load_state_dict(w13, strict=False)
    name, tensor = next(iter(w13.items()))
    assert torch.equal(ours.state_dict()[name.replace("w13", "w3_EFD")], tensor[:, :, 1])


def test_two_steps_of_training(ids):
    theirs, ours = build("qwen3"), build("qwen3", OURS)
    ours.load_state_dict(theirs.state_dict())
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            losses.append(step(model, ids)[0])
            optimizer.step()
    right, mine = losses[:3], losses[3:]
    assert mine[2] < mine[1] < mine[0]
    assert mine == pytest.approx(right, rel=1e-2)


def test_another_dispatcher_keeps_its_dispatch(ids):
    class Dispatcher(LocalTokenDispatcher):
        calls = 0

        def dispatch(self, *arguments):
            Dispatcher.calls += 1
            return super().dispatch(*arguments)

    ours = build("qwen3", OURS)
    right = step(ours, ids)[1]
    for module in ours.modules():
        if hasattr(module, "token_dispatcher"):
            module.token_dispatcher.__class__ = Dispatcher
            module.dispatches = True
    same(step(ours, ids)[1], right)
    assert Dispatcher.calls == 2


def test_other_experts_are_refused():
    registry = importlib.import_module("torchtitan.models.gpt_oss").model_registry
    config = registry("debugmodel").model
    with pytest.raises(RuntimeError, match="torchtitan: inner_experts: expected GroupedExperts"):
        apply_overrides(OverrideConfig(imports=[OURS]), config)
