"""Comparisons: what they say, and that they take only results of their own settings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import command_line, contents, write_text

from trainer import start
from trainer.compare import main as compare
from trainer.compare import plot, summarize
from trainer.metrics import read_metrics


def test_compare(flags, tmp_path, monkeypatch):
    argv = flags(
        "--seeds", "1", "--policies", "nearest,balanced", name="cmp", steps=4, eval_every=2
    )
    assert compare(argv) == 0
    folder = tmp_path / "runs" / "cmp"
    for run in folder.glob("*-0"):  # the metrics of a finished run are all it takes
        shutil.rmtree(run / "checkpoints")
    monkeypatch.setattr(start, "train", lambda *unused: pytest.fail("trained again"))
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
        [sys.executable, "-m", "trainer.compare", *argv], env=environment, start_new_session=True
    )
    runs = [tmp_path / "runs" / "two" / run for run in ("topk-0", "nearest-0")]
    paths = [run / "metrics.jsonl" for run in runs]
    while not all(path.exists() and read_metrics(path) for path in paths):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    assert process.wait() == 130
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
    error = capfd.readouterr().err
    assert (
        error.startswith("compare: error: run ") and "nothing" in error and error.count("\n") == 1
    )


# ---------------------------------------------------------------------------- what is there already


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    write_text(folder / "text")
    argv = command_line(folder, "--seeds", "1", name="c", steps=2, eval_every=2)
    assert compare(argv) == 0
    return folder


@pytest.fixture
def comparison(compared, tmp_path):
    """A copy of a comparison, and the command line that made it."""
    shutil.copytree(compared / "runs", tmp_path / "runs", symlinks=True)
    text = {"runs_dir": tmp_path / "runs", "steps": 2, "eval_every": 2}

    def argv(**changes):
        return command_line(compared, "--seeds", "1", **{"name": "c", **text, **changes})

    return tmp_path / "runs" / "c", argv


@pytest.mark.parametrize(
    "changes",
    [{"lr": 0.5}, {"steps": 4}, {"steps": 1}, {"eval_every": 1}, {"hidden_size": 64}, {"tile": 16},
     {"dtype": "bfloat16"}, {"data": "/elsewhere"}, {"aux_coef": 0.5}],
)  # fmt: skip
def test_results_of_other_settings_are_not_taken(refuse, comparison, changes):
    folder, argv = comparison
    before = contents(folder)
    (field,) = changes
    refuse(argv(**changes), f"--{field.replace('_', '-')} is", "--name NAME", entry=compare)
    assert contents(folder) == before


def test_what_does_not_shape_a_curve_may_change(comparison, monkeypatch):
    _, argv = comparison
    monkeypatch.setattr(start, "train", lambda *unused: pytest.fail("trained again"))
    assert compare(argv(threads=2, save_every=7, sample_prompt="x", device="cpu")) == 0


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def last_line(folder, change):
    path = folder / "topk-0" / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:-1], change(lines[-1])]) + b"\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: os.truncate(c / "topk-0" / "metrics.jsonl", 300), "ends at step 1"),
        (lambda c: os.truncate(c / "topk-0" / "metrics.jsonl", 0), "ends at step 0"),
        (lambda c: last_line(c, lambda line: line + b"\n3"), "line 3"),
        (lambda c: last_line(c, lambda line: line.split(b', "val_loss"')[0] + b"}"), "validation"),
        (lambda c: (c / "topk-0" / "config.json").unlink(), "config.json"),
        (lambda c: (c / "nearest-0" / "config.json").write_text("{"), "config.json"),
        (lambda c: change_json(c / "topk-0" / "config.json", data_digest="1" * 64), "texts"),
        (lambda c: (c / "compare.json").write_text('{"mine": 1}'), "compare.json"),
        (lambda c: (c / "compare.json").write_text("{"), "compare.json"),
        (lambda c: (c / "compare.json").unlink(), "compare.png"),
        (lambda c: (c / "config.json").write_text("{}"), "no comparison"),
        (lambda c: (shutil.rmtree(c / "topk-0"), (c / "topk-0").write_text("")), "no run"),
    ],
)
def test_a_damaged_or_foreign_comparison_is_named(refuse, comparison, damage, words):
    folder, argv = comparison
    damage(folder)
    before = contents(folder)
    refuse(argv(), words, entry=compare)
    assert contents(folder) == before


def test_runs_on_different_texts_are_not_compared(refuse, comparison, text_folder):
    folder, argv = comparison
    shutil.rmtree(folder / "nearest-0")
    for run in ("topk-0",):
        change_json(folder / run / "config.json", data=str(text_folder))
    (text_folder / "file0.txt").write_text("another text\n" * 300)
    refuse(argv(data=text_folder), "has changed", entry=compare)
    assert not (folder / "nearest-0").exists()
