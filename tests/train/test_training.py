"""Training, resuming, stopping, and what a run leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from pretrain import checkpoint, loop, restore, trainer
from pretrain.compare import main as compare
from pretrain.compare import plot, summarize
from pretrain.metrics import read_metrics
from pretrain.train import main
from transformers import AutoTokenizer, Qwen3MoeForCausalLM


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


def test_sigterm_saves(flags, run_dir, monkeypatch):
    step = trainer.Trainer.train_step

    def terminated(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", terminated)
    assert main(flags()) == 143
    assert restore.load_state(run_dir).step == 1


@pytest.mark.parametrize("moment", ["sync", "rename", "replace"])
def test_kill_while_writing_leaves_the_last_good_checkpoint(flags, run_dir, monkeypatch, moment):
    """The child dies by SIGKILL inside the save after step 4; step 2 must still resume."""
    child = os.fork()
    if child == 0:
        save = checkpoint.save

        def deadly(folder, state, *rest):
            if state.step == 4:
                place = checkpoint if moment == "sync" else checkpoint.os
                setattr(place, moment, lambda *a: os.kill(os.getpid(), signal.SIGKILL))
            save(folder, state, *rest)

        checkpoint.save = deadly
        os._exit(main(flags(save_every=2)))
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert restore.load_state(run_dir).step == 2
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
        loop.Run, "finish", lambda self, s: (trained.append(self.trainer), finish(self, s))
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
    from pretrain.data import load_corpus

    first = load_corpus(str(text_folder))
    assert first.validation and not set(first.validation) & set(first.train)
    assert first.validation_names == load_corpus(str(text_folder)).validation_names
    shutil.copy(text_folder / "file0.txt", text_folder / "another.txt")
    assert load_corpus(str(text_folder)).digest != first.digest


def test_compare(flags, tmp_path, monkeypatch):
    argv = flags(
        "--seeds", "1", "--policies", "nearest,balanced", name="cmp", steps=4, eval_every=2
    )
    assert compare(argv) == 0
    folder = tmp_path / "runs" / "cmp"
    for run in folder.glob("*-0"):  # the metrics of a finished run are all it takes
        shutil.rmtree(run / "checkpoints")
    monkeypatch.setattr(loop, "train", lambda *unused: pytest.fail("trained again"))
    assert compare(argv) == 0
    record = json.loads((folder / "compare.json").read_text())
    assert list(record["variants"]) == ["topk", "nearest", "balanced"]
    assert (folder / "compare.png").stat().st_size > 0
    for policy in ("nearest", "balanced"):
        figures = record["variants"][policy]
        assert abs(figures["difference_percent"]) < 5 and figures["imbalance"] >= 1
        assert 0 < figures["share_dropped"] < 0.5 and 0 < figures["share_added"] < 0.5
        lines = read_metrics(folder / f"{policy}-0" / "metrics.jsonl")
        assert all(m["rows"] % 8 == 0 for m in lines)
    plain = read_metrics(folder / "topk-0" / "metrics.jsonl")
    assert all(m["rows"] == 2 * 64 * 2 and m["rows_dropped"] == 0 for m in plain)


def test_compare_side_by_side(flags, tmp_path):
    switches, changes = ("--seeds", "1", "--policies", "nearest"), {"steps": 4, "eval_every": 2}
    assert compare(flags(*switches, name="one", **changes)) == 0
    assert compare(flags(*switches, "--jobs", "2", name="two", **changes)) == 0
    folder = tmp_path / "runs"
    record = json.loads((folder / "two" / "compare.json").read_text())
    assert list(record["variants"]) == ["topk", "nearest"]
    for run in ("topk-0", "nearest-0"):
        losses = [
            [line["loss"] for line in read_metrics(folder / name / run / "metrics.jsonl")]
            for name in ("one", "two")
        ]
        assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_a_signal_to_the_group_stops_and_saves_runs_side_by_side(flags, tmp_path):
    argv = flags("--seeds", "1", "--jobs", "2", name="two", steps=100000, eval_every=100000)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain.compare", *argv], env=environment, start_new_session=True
    )
    runs = [tmp_path / "runs" / "two" / run for run in ("topk-0", "nearest-0")]
    paths = [run / "metrics.jsonl" for run in runs]
    deadline = time.monotonic() + 120
    while not all(path.exists() and read_metrics(path) for path in paths):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    assert process.wait(timeout=60) == 130
    for run in runs:
        assert "stopped and saved" in run.with_name(f"{run.name}.log").read_text()
        saved = int((run / "checkpoint").resolve().name.removeprefix("step-"))
        assert saved == read_metrics(run / "metrics.jsonl")[-1]["step"] > 0


def test_compare_pairs_the_seeds_that_are_done(tmp_path):
    def run(loss, steps=(2, 4)):
        line = {
            "rows": 8,
            "rows_dropped": 0,
            "rows_added": 0,
            "tokens": 1,
            "tokens_per_second": 1.0,
        }
        return [
            line | {"step": step, "val_loss": loss, "expert_shares": [[0.5, 0.5]]} for step in steps
        ]

    summary = summarize(
        {
            "topk": {1: run(2.0)},
            "nearest": {0: run(9.0), 1: run(2.1, (2, 4, 6))},
            "up": {0: run(3.0)},
        }
    )
    assert summary["nearest"]["difference_percent"] == pytest.approx(5.0)
    assert summary["nearest"]["seeds"] == 1 and summary["up"]["seeds"] == 0
    assert "difference_percent" not in summary["up"]
    plot(summary, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 0


def test_compare_side_by_side_reports_a_failure(flags, tmp_path, capfd):
    argv = flags("--seeds", "1", "--jobs", "2", name="two", data=tmp_path / "nothing")
    assert compare(argv) == 2
    assert "nothing" in capfd.readouterr().err


@pytest.mark.parametrize(
    "raised",
    [torch.OutOfMemoryError("no room"), RuntimeError("CUDA out of memory. sonicmoe_cpp could not")],
)
def test_out_of_memory_names_the_sizes(flags, capsys, monkeypatch, raised):
    def too_large(self):
        raise raised

    monkeypatch.setattr(trainer.Trainer, "train_step", too_large)
    assert main(flags()) == 1
    error = capsys.readouterr().err
    assert "2 sequences of 32 tokens" in error and "H [128, 32]" in error
    assert "largest microbatch by formula is" in error and error.count("\n") == 1
