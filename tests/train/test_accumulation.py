"""--accumulate N: the step of a batch N times as large, in N passes."""

import dataclasses

import pytest
import sonicmoe_cpp as sm
import torch
from torch.nn.functional import cross_entropy

from trainer import footprint
from trainer.config import TrainConfig
from trainer.data import Batches
from trainer.metrics import read_metrics
from trainer.train import main
from trainer.trainer import Trainer


def test_the_parts_of_a_step_are_the_larger_batch():
    tokens = torch.arange(3001).numpy()
    small = Batches(tokens, TrainConfig(batch_size=2, accumulate=3, seq_len=16))
    large = Batches(tokens, TrainConfig(batch_size=6, seq_len=16))
    assert small.per_epoch == large.per_epoch == 31
    for step in (0, 1, 30, 31):  # 31 begins the second epoch
        parts = [small(step, part) for part in range(3)]
        for ours, theirs in zip(zip(*parts, strict=True), large(step), strict=True):
            assert torch.equal(torch.cat(ours), theirs)


@pytest.fixture
def trained(flags, tmp_path, monkeypatch):
    """Trains; returns the lines of metrics and the gradients of every step."""
    gradients, update = [], Trainer.update

    def noted(self):
        gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        return update(self)

    monkeypatch.setattr(Trainer, "update", noted)

    def trained(name, **changes):
        gradients.clear()
        assert main(flags(name=name, steps=3, seq_len=16, **changes)) == 0
        return read_metrics(tmp_path / "runs" / name / "metrics.jsonl"), list(gradients)

    return trained


def test_a_step_is_that_of_the_larger_batch(trained):
    small, ours = trained("small", batch_size=2, accumulate=4, aux_coef=0)
    large, theirs = trained("large", batch_size=8, aux_coef=0)
    for mine, their in zip(ours, theirs, strict=True):
        assert (mine - their).norm() < 1e-5 * their.norm()
        assert their.norm() > 0.01
    for mine, their in zip(small, large, strict=True):
        assert mine["loss"] == pytest.approx(their["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-4)
        for count in ("tokens", "rows", "rows_dropped", "rows_added"):
            assert mine[count] == their[count]
    for mine, their in zip(small[-1]["expert_shares"], large[-1]["expert_shares"], strict=True):
        assert mine == pytest.approx(their, abs=0.02)
        assert sum(mine) == pytest.approx(1, abs=1e-4)


def test_the_balancing_loss_is_the_mean_of_the_batches(trained, monkeypatch):
    parts, forward_backward = [], Trainer.forward_backward

    def noted(self, part=0):
        parts.append(forward_backward(self, part))
        return parts[-1]

    monkeypatch.setattr(Trainer, "forward_backward", noted)
    lines, _ = trained("run", batch_size=2, accumulate=3)
    assert len(parts) == 9
    for index, line in enumerate(lines):
        losses, aux = zip(*parts[3 * index :][:3], strict=True)
        assert line["loss"] == pytest.approx(float(sum(losses)) / 3)
        assert line["aux_loss"] == pytest.approx(float(sum(aux)) / 3)
        assert len({float(one) for one in aux}) == 3


def test_main_grads_of_the_parts_add_up_to_those_of_the_whole():
    """A head on a layer with bfloat16 weights and float32 main_grad, as Megatron trains."""
    torch.manual_seed(0)
    layer = sm.MoE(32, 16, num_experts=8, top_k=2, main_grad=True, dtype=torch.bfloat16)
    for parameter in layer.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    x = torch.randn(8, 16, 32, dtype=torch.bfloat16)
    targets = torch.randint(32, (8, 16))

    def gradients(parts):
        for parameter in layer.parameters():
            parameter.main_grad.zero_()
        for some, wanted in zip(x.chunk(parts), targets.chunk(parts), strict=True):
            logits = layer(some).float().flatten(0, 1)
            (cross_entropy(logits, wanted.flatten()) / parts).backward()
        return torch.cat([p.main_grad.flatten() for p in layer.parameters()])

    whole, in_parts = gradients(1), gradients(4)
    # dY is rounded to bfloat16 after a division by a power of two: the same bits but for the order
    # of float32 sums.
    assert (in_parts - whole).norm() < 1e-5 * whole.norm()
    assert whole.norm() > 1e-3
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_resume_continues_within_the_same_steps(flags, tmp_path):
    same = {"batch_size": 1, "accumulate": 2}
    assert main(flags(name="whole", **same)) == 0
    assert main(flags(name="parts", steps=3, warmup=0, **same)) == 0
    runs = tmp_path / "runs"
    resumed = ["--resume", "--name", "parts", "--runs-dir", str(runs), "--steps", "6"]
    assert main(resumed) == 0
    tokens = [line["tokens"] for line in read_metrics(runs / "parts" / "metrics.jsonl")]
    assert tokens == [line["tokens"] for line in read_metrics(runs / "whole" / "metrics.jsonl")]
    assert tokens == [64 * step for step in range(1, 7)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_one_batch_stay_while_the_next_is_computed(dtype):
    config = TrainConfig(dtype=dtype, batch_size=64)
    more = dataclasses.replace(config, accumulate=4)
    peaks = [
        footprint.peak(one, footprint.layout_of(one), 2048, one.batch_size)
        for one in (config, more)
    ]
    gradients = 4 * footprint.parameters(config, 2048).total
    assert peaks[1]["states"] - peaks[0]["states"] == gradients
    assert peaks[0]["peak"] < peaks[1]["peak"] <= peaks[0]["peak"] + gradients
