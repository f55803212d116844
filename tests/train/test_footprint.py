"""Memory and work by formula: against what autograd keeps, and against `sonicmoe memory`."""

import dataclasses
import json
import os
import subprocess

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from trainer import footprint
from trainer.config import TrainConfig
from trainer.model import autocast, new_model
from trainer.routing import RoutingTap

VOCABULARY = 512
PURE = footprint.Layout(14, 2, 0, 2, 2, logit_rows=256)  # bfloat16 parameters
SMALL = TrainConfig(
    hidden_size=128, intermediate_size=64, layers=3, heads=4, num_experts=16, top_k=4, seq_len=256,
    tile=16, dtype="float32",
)  # fmt: skip
LARGE = TrainConfig(
    hidden_size=1536, intermediate_size=256, layers=12, heads=12, num_experts=128, top_k=8,
    seq_len=4096, dtype="float32",
)  # fmt: skip


def bytes_kept(config, layout):
    """Of one forward pass of two sequences without head and loss: distinct storages, no weights."""
    model = new_model(config, VOCABULARY, 0)
    if layout is PURE:
        model = model.bfloat16()
    tap = RoutingTap(model, config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    tokens = torch.randint(VOCABULARY, (2, config.seq_len))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast(config, torch.device("cpu")):
            model.model(tokens, use_cache=False)
        tap.balancing_loss()
    return sum(kept.values())


@pytest.mark.parametrize("layout", ["pure", "autocast", "float32"])
@pytest.mark.parametrize("router", ["topk", "token-rounding", "grouped_mm"])
def test_kept_bytes_within_two_percent(router, layout):
    if (router, layout) == ("grouped_mm", "autocast"):
        pytest.skip("transformers falls back to a loop there: torch's grouped_mm takes no float32")
    config = dataclasses.replace(
        SMALL,
        router="token-rounding" if router == "token-rounding" else "topk",
        experts="grouped_mm" if router == "grouped_mm" else "sonicmoe_cpp",
        dtype="bfloat16" if layout == "autocast" else "float32",
    )
    layout = PURE if layout == "pure" else footprint.layout_of(config)
    count = footprint.parameters(config, VOCABULARY)
    figures = footprint.peak(config, layout, VOCABULARY, 2)
    cast = layout.cast * (count.total - count.head - count.embedding)
    formula = figures["moe_kept"] + figures["other_kept"] + cast
    assert formula == pytest.approx(bytes_kept(config, layout), rel=0.02)


def test_parameters_are_the_models():
    count = footprint.parameters(SMALL, VOCABULARY)
    model = new_model(SMALL, VOCABULARY, 0)
    assert count.total == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for p in model.model.layers[0].mlp.experts.parameters())
    assert count.experts == experts
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    idle = SMALL.layers * experts * (1 - SMALL.top_k / SMALL.num_experts)
    assert count.active == count.total - norms - count.embedding - idle


def test_flops_of_the_benchmarks_model():
    per_layer = 4 * 1536**2 + 128 * 1536 + 8 * 3 * 1536 * 256
    products = 6 * (12 * per_layer + 16384 * 1536)
    assert footprint.flops_per_token(LARGE, 16384) == products + 6 * 12 * 4096 * 1536


def command_line():
    path = os.environ.get("SONICMOE_CLI")
    if not path:
        pytest.skip("SONICMOE_CLI is not set")
    return path


def test_moe_part_is_that_of_sonicmoe_memory():
    shape = "4096,1536,256,128,8"
    argv = [command_line(), "memory", "--shape", shape, "--layers", "12", "--json"]
    told = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)["sonicmoe"]
    logits = 4 * 4096 * 128
    assert footprint.moe_kept(LARGE, PURE, 4096) == told["kept_bytes"] + logits
    around = 2 * 2 * 4096 * 1536
    assert footprint.moe_transient(LARGE, PURE, 4096) == told["transient_backward_bytes"] + around


def test_largest_microbatch_is_the_last_that_fits():
    capacity = 78 * footprint.GIB
    sizes = {}
    for experts in ("sonicmoe_cpp", "grouped_mm"):
        config = dataclasses.replace(LARGE, experts=experts)
        most = footprint.largest_microbatch(config, PURE, 16384, capacity)
        peaks = [footprint.peak(config, PURE, 16384, most + i)["peak"] for i in (0, 1)]
        assert peaks[0] <= capacity < peaks[1]
        sizes[experts] = most
    assert sizes["sonicmoe_cpp"] > 1.5 * sizes["grouped_mm"]
    assert footprint.largest_microbatch(LARGE, PURE, 16384, footprint.GIB) == 0


@pytest.mark.parametrize("layout", [PURE, footprint.AUTOCAST])
def test_sonicmoe_memory_predicts_the_same_microbatch(layout):
    capacity = 78 * footprint.GIB
    most = footprint.largest_microbatch(LARGE, layout, 16384, capacity)
    _, *argv = footprint.memory_command(LARGE, layout, 16384, most, capacity)
    run = subprocess.run([command_line(), *argv, "--json"], capture_output=True, check=True)
    told = json.loads(run.stdout)["sonicmoe"]
    whole = footprint.peak(LARGE, layout, 16384, most)["peak"]
    assert told["total_bytes_all_layers"] == pytest.approx(whole, rel=1e-6)
    assert told["tokens_that_fit"] // LARGE.seq_len == most


def test_layers_by_parameters_and_by_memory():
    def layers(gib, most):
        return footprint.layers_that_fit(LARGE, PURE, 16384, gib * footprint.GIB, 4, most)

    assert layers(78, 2e9) == 12
    assert layers(30, 2e9) < 12 and layers(1, 2e9) == 0
    assert layers(78, 1e10) > 20


def test_report_names_tensors_and_a_microbatch():
    config = dataclasses.replace(LARGE, experts="grouped_mm")
    report = footprint.out_of_memory_report(config, PURE, 16384, 32, 78 * footprint.GIB)
    assert (
        "32 sequences of 4096" in report and "rows and Y, each [1048576, 1536] 3072 MiB" in report
    )
    fits = footprint.largest_microbatch(config, PURE, 16384, 78 * footprint.GIB)
    assert report.endswith(f"the largest microbatch by formula is {fits} sequences")
