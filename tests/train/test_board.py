"""What a run says of itself: events for TensorBoard, and the last validation loss on --resume."""

import importlib.util

import pytest

from trainer.metrics import read_metrics
from trainer.train import main


def scalars(folder):
    """Values by step of every tag."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_metrics(flags, run_dir):
    assert main(flags(report_to="tensorboard")) == 0
    lines, shown = read_metrics(run_dir / "metrics.jsonl"), scalars(run_dir / "tensorboard")
    names = lines[-1].keys() - {"step", "expert_shares"}
    assert shown.keys() == names | {"busiest_expert/layer_0", "busiest_expert/layer_1"}
    for name in names:
        expected = [(line["step"], line[name]) for line in lines if name in line]
        assert len(expected) == (2 if name == "val_loss" else 6)
        assert shown[name] == [(step, pytest.approx(value)) for step, value in expected]
    busiest = [8 * max(line["expert_shares"][1]) for line in lines if "expert_shares" in line]
    assert [value for _, value in shown["busiest_expert/layer_1"]] == pytest.approx(busiest)


def test_a_resumed_run_shows_every_step_once(flags, run_dir):
    assert main(flags(report_to="tensorboard", steps=4)) == 0
    again = ["--resume", "--name", "run", "--runs-dir", str(run_dir.parent)]
    assert main([*again, "--steps", "6"]) == 0
    assert [step for step, _ in scalars(run_dir / "tensorboard")["loss"]] == [1, 2, 3, 4, 5, 6]


def test_no_events_unasked(finished):
    assert not (finished / "runs" / "run" / "tensorboard").exists()


def test_without_the_package_it_is_refused_at_once(refuse, flags, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "tensorboard" else find(name),
    )
    refuse(flags(report_to="tensorboard"), "--report-to tensorboard", "not installed")
    assert not (tmp_path / "runs").exists()


def test_resume_shows_the_last_validation_loss(damaged, capsys):
    last = read_metrics(damaged / "metrics.jsonl")[-1]
    before = read_metrics(damaged / "metrics.jsonl")[2]
    assert "val_loss" in before and last["step"] == 4 and "val_loss" in last
    resume = ["--resume", "--name", "run", "--runs-dir", str(damaged.parent)]
    capsys.readouterr()
    assert main([*resume, "--steps", "5", "--eval-every", "9"]) == 0
    told = capsys.readouterr().out
    shown = f"{last['val_loss']:.3f} (step 4)"
    assert f"step 4 of 5; last validation loss {shown}" in told


def test_a_new_run_has_none_to_show(flags, capsys):
    assert main(flags(steps=1)) == 0
    assert "last validation loss" not in capsys.readouterr().out
