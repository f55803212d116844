"""bench/train.py: its arithmetic, and a whole run on a tiny model without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from bench import train
from bench.lib import step, train_worker
from trainer import model, precision
from trainer.config import TrainConfig

TINY = (
    "--device cpu --hidden-size 64 --intermediate-size 32 --num-experts 8 --top-k 2 --heads 2 "
    "--layers 2 --seq-len 64 --vocab-size 300 --microbatch 2 --steps 2 --warmup 1 --tile 8 "
    "--limit 3000 --deadline 3600"  # a busy machine must not cut it short
).split()


@pytest.mark.parametrize("limit", range(12))
@pytest.mark.parametrize("start", [1, 4])
def test_search_finds_the_limit(limit, start):
    asked = []
    best, tried = step.largest(lambda n: asked.append(n) or n <= limit, start, 8)
    assert best == min(limit, 8)
    assert len(asked) == len(set(asked)) == len(tried) <= 6


def test_buckets_hold_every_parameter_once():
    parameters = [torch.empty(n) for n in (3, 5, 1, 9, 2)]
    found = list(precision.buckets(parameters, 6))
    assert [len(bucket) for bucket in found] == [2, 2, 1]
    assert [p for bucket in found for p in bucket] == parameters


def test_master_weights_keep_what_bfloat16_loses():
    parameter = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    reference = torch.nn.Parameter(torch.ones(2, 2))
    ours = precision.MasterAdamW([parameter], TrainConfig(lr=1e-4))
    theirs = torch.optim.AdamW([reference], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(40):
        parameter.grad = torch.full((2, 2), 0.25, dtype=torch.bfloat16)
        reference.grad = torch.full((2, 2), 0.25)
        ours.step()
        theirs.step()
    torch.testing.assert_close(ours.buckets[0][1][0], reference.detach())
    assert (parameter == reference.bfloat16()).all() and (parameter < 1).all()


def test_gradients_are_clipped_to_norm_one():
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = precision.MasterAdamW([parameter], TrainConfig(lr=1.0))
    parameter.grad = torch.tensor([30.0, 40.0], dtype=torch.bfloat16)
    assert optimizer.clip(1.0) == 50
    optimizer.step()
    moment = optimizer.buckets[0][2].state[optimizer.buckets[0][1][0]]["exp_avg"]
    torch.testing.assert_close(moment, 0.1 * torch.tensor([0.6, 0.8]), rtol=1e-2, atol=0)


def test_logits_in_parts_make_the_same_loss_and_gradients():
    hidden, head = torch.randn(2, 5, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)
    targets = torch.randint(7, (2, 5))
    whole = model.cross_entropy(hidden, head, targets)
    parts = model.cross_entropy(hidden, head, targets, rows=3)
    torch.testing.assert_close(parts, whole)
    gradients = [torch.autograd.grad(loss, (hidden, head)) for loss in (parts, whole)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert whole > 0.1


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void sonicmoe::grouped_gemm<128>(Args)", "sonicmoe"),
        ("nvjet_tst_192x192_64x3", "products"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("multi_tensor_apply_kernel", "optimizer"),
        ("triton_red_fused_mul_3", "compiled"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("vectorized_elementwise_kernel", "pointwise"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert train_worker.kind_of(kernel) == kind


def timing(system, mode, microbatch, speed):
    row = {"kind": "timing", "system": system, "mode": mode}
    return {**row, "microbatch": microbatch, "tokens_per_s": speed}


def losses(system, values):
    return {"kind": "losses", "system": system, "mode": "plain", "losses": values}


def test_summary_compares_with_the_best_of_grouped_mm():
    rows = [
        timing("sonicmoe", "plain", 4, 100.0),
        timing("sonicmoe", "compile", 4, 300.0),
        timing("sonicmoe", "plain", 16, 400.0),
        timing("grouped_mm", "plain", 4, 150.0),
        timing("grouped_mm_select", "compile", 4, 200.0),
        timing("grouped_mm", "plain", 8, 160.0),
        losses("sonicmoe", [5.0] * 9 + [4.0] * 11),
        losses("grouped_mm", [5.0] * 10 + [4.0] * 10),
        {"kind": "search", "system": "sonicmoe", "mode": "plain", "largest": 16},
    ]
    summary = train.summarize(rows)
    ratios = summary["tokens_per_s_over_best_grouped_mm"]
    assert ratios["common"]["sonicmoe"] == 1.5 and ratios["largest"]["sonicmoe"] == 2.5
    difference = summary["losses_against_grouped_mm"]["sonicmoe:plain"]
    assert difference["steps"] == 20 and difference["largest"] == 1.0
    assert difference["largest_of_means"] == pytest.approx(0.1)
    assert summary["largest_microbatch"] == {"sonicmoe:plain": 16}
    assert train.summarize([])["tokens_per_s_over_best_grouped_mm"] == {}


def environment():
    return os.environ | {"PYTHONPATH": str(REPOSITORY / "bindings" / "torch")}


def bench(tmp_path, *flags):
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "bench.train", *TINY, "--output", str(record)]
    run = subprocess.run(
        [*command, *flags], capture_output=True, text=True, cwd=REPOSITORY, env=environment()
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(record.read_text())


def test_a_whole_run(tmp_path):
    systems = ["sonicmoe:plain", "grouped_mm:plain", "eager:plain", "sonicmoe:graph"]
    flags = ["--most", "3", "--loss-steps", "4", "--gpus", "2"]
    record = bench(tmp_path, *flags, "--run", *systems)
    assert {"commit", "date", "device", "versions", "command", "rows"} <= record.keys()
    rows = {(row["system"], row["kind"], row.get("microbatch")): row for row in record["rows"]}
    models = [row for row in record["rows"] if row["kind"] == "model"]
    assert len({row["checksum"] for row in models}) == 1 and len(models) == 3
    assert {row["gpu"] for row in record["rows"]} == {"0", "1"}
    for system in ("sonicmoe", "grouped_mm", "eager"):
        assert rows[system, "search", None]["largest"] == 3
        for microbatch in (2, 3):
            row = rows[system, "timing", microbatch]
            moe = row["moe_forward_ms"] + row["moe_backward_ms"]
            assert row["tokens_per_s"] * row["step_ms"] == pytest.approx(
                64e3 * microbatch, rel=0.01
            )
            assert row["moe_share"] * row["step_ms"] == pytest.approx(moe, rel=0.01)
            assert "optimizer_ms" in row
        ours = rows[system, "losses", 2]["losses"]
        theirs = rows["grouped_mm", "losses", 2]["losses"]
        assert len(ours) == 4 and ours == pytest.approx(theirs, abs=0.02)
    failed = [row for row in record["rows"] if row["kind"] == "failed"]
    assert [row["reason"] for row in failed] == ["a CUDA graph needs a GPU"]


def test_a_worker_that_dies_leaves_a_reason(tmp_path):
    record = bench(tmp_path, "--most", "0", "--heads", "3", "--run", "sonicmoe:plain")
    row = record["rows"][-1]
    assert row["kind"] == "failed" and row["reason"].startswith("exit code 1")


def test_a_record_is_drawn(tmp_path):
    rows = [
        {"kind": "model", "system": "sonicmoe", "layers": 2, "total": 9, "active": 3},
        {**timing("sonicmoe", "plain", 4, 100.0), "step_ms": 9.0, "kernels": {"sonicmoe": 5.0}},
        timing("sonicmoe", "plain", 16, 400.0),
        losses("sonicmoe", [5.0] * 20),
    ]
    record = {"rows": rows, "device": "x", "date": "2026-01-01T", "versions": {"torch": "2"}}
    (tmp_path / "r.json").write_text(json.dumps(record))
    picture = tmp_path / "p.png"
    command = ["-m", "bench.train_plots", str(tmp_path / "r.json"), "--output", str(picture)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=REPOSITORY)
    assert picture.stat().st_size > 1000
