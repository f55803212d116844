"""Training, resuming, stopping, and what a run leaves behind."""

import json
import os
import shutil
import signal

import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from trainer import checkpoint, loop, restore, trainer
from trainer.metrics import read_metrics
from trainer.train import main


def losses(run):
    lines = read_metrics(run / "metrics.jsonl")
    return [(m["step"], m["loss"], m.get("val_loss")) for m in lines]


@pytest.mark.parametrize("policy", [None, "nearest", "stochastic"])
def test_resume_continues_the_same_curve_bit_for_bit(flags, tmp_path, monkeypatch, policy):
    router = {"router": "token-rounding", "policy": policy} if policy else {}
    assert main(flags(name="whole", **router)) == 0
    step = trainer.Trainer.train_step

    def interrupted(self):
        line = step(self)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return line

    monkeypatch.setattr(trainer.Trainer, "train_step", interrupted)
    assert main(flags(name="parts", **router)) == 130
    monkeypatch.undo()
    runs = tmp_path / "runs"
    assert len(losses(runs / "parts")) == 4
    assert main(["--resume", "--name", "parts", "--runs-dir", str(runs)]) == 0
    assert losses(runs / "parts") == losses(runs / "whole")
    assert len({loss for _, loss, _ in losses(runs / "whole")}) == 6


@pytest.mark.parametrize("moment", ["sync", "rename", "replace"])
def test_kill_while_writing_leaves_the_last_good_checkpoint(flags, run_dir, monkeypatch, moment):
    """The child dies by SIGKILL inside the save after step 4; step 2 must still resume."""
    child = os.fork()
    if child == 0:
        save = checkpoint.save

        def deadly(folder, content, group):
            if content.step == 4:
                place = checkpoint if moment == "sync" else checkpoint.os
                setattr(place, moment, lambda *a: os.kill(os.getpid(), signal.SIGKILL))
            save(folder, content, group)

        checkpoint.save = deadly
        os._exit(main(flags(save_every=2)))
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    restore.verify(run_dir)
    assert checkpoint.last_step(run_dir) == 2
    assert main(["--resume", "--name", "run", "--runs-dir", str(run_dir.parent)]) == 0
    assert [step for step, _, _ in losses(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert os.listdir(run_dir / "checkpoints") == ["step-000006"]


def test_same_losses_as_eager(flags, tmp_path):
    for experts in ("eager", "sonicmoe_cpp", "grouped_mm"):
        assert main(flags(name=experts, experts=experts, steps=10)) == 0
    ours = losses(tmp_path / "runs" / "sonicmoe_cpp")
    for experts in ("eager", "grouped_mm"):
        theirs = losses(tmp_path / "runs" / experts)
        assert len(ours) == len(theirs) == 10
        assert max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)) <= 2e-3
    assert ours[-1][1] < ours[0][1] - 0.1


def test_run_folder_and_stock_transformers(flags, run_dir, monkeypatch):
    trained = []
    finish = loop.Run.finish
    monkeypatch.setattr(
        loop.Run, "finish", lambda self: (trained.append(self.trainer), finish(self))
    )
    assert main(flags(steps=9)) == 0
    for name in ("metrics.jsonl", "loss.png", "config.json", "sample.txt", "memory.json"):
        assert (run_dir / name).stat().st_size > 0
    stock = Qwen3MoeForCausalLM.from_pretrained(run_dir / "checkpoint")
    tokens, _ = trained[0].text.batches(0)
    assert len(AutoTokenizer.from_pretrained(run_dir / "checkpoint")) == stock.config.vocab_size
    with torch.no_grad():
        theirs, ours = stock(tokens).logits, trained[0].model.eval()(tokens).logits
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    report = json.loads((run_dir / "memory.json").read_text())
    for measured, rows in zip(
        report["measured_bytes_per_layer"], report["rows_per_layer"], strict=True
    ):
        h = rows * 2 * 16 * 4
        assert h <= measured <= h + rows * 32 + 8192  # a constant for offsets and alignment


def test_held_out_files_are_not_trained_on(text_folder):
    from trainer.data import load_corpus

    first = load_corpus(str(text_folder))
    assert first.validation and not set(first.validation) & set(first.train)
    assert first.validation_names == load_corpus(str(text_folder)).validation_names
    shutil.copy(text_folder / "file0.txt", text_folder / "another.txt")
    assert load_corpus(str(text_folder)).digest != first.digest
