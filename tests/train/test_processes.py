"""--gpus, --processes, torchrun: what is refused before there are processes, and what ends them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, contents
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from trainer import checkpoint, launch, restore, signals
from trainer.config import TrainConfig
from trainer.group import is_lost_connection
from trainer.layout import Layout
from trainer.metrics import read_metrics
from trainer.request import parse_train
from trainer.sizes import Sizes
from trainer.train import main

# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("switches", "changes", "words"),
    [
        ([], {"processes": 2, "ep": 3}, ["--ep 3", "divisor of the 2 processes"]),
        ([], {"processes": 2, "ep": 2, "num_experts": 7}, ["--ep 2", "--num-experts 7"]),
        ([], {"processes": 2, "ep": 2, "experts": "eager"}, ["--ep 2", "eager"]),
        ([], {"ep": 2}, ["--ep 2", "the 1 processes"]),
        (["--fsdp"], {}, ["--fsdp", "several processes"]),
        (["--fsdp"], {"processes": 1}, ["--fsdp", "several processes"]),
        ([], {"processes": 3}, ["--batch-size 2", "multiple of the 3 processes"]),
        ([], {"processes": 2, "gpus": 2}, ["--gpus 2 and --processes 2"]),
        ([], {"gpus": 2, "device": "cpu"}, ["--gpus 2", "--device cpu"]),
        ([], {"processes": 2, "device": "cuda"}, ["--processes 2", "--device cuda"]),
        ([], {"gpus": 512, "batch_size": 512}, ["--gpus 512", "that torch sees"]),
        ([], {"processes": 2, "row_capacity": 1.5}, ["--row-capacity 1.5", "--ep"]),
        ([], {"processes": 2, "ep": 2, "row_capacity": -1}, ["--row-capacity", "'-1'"]),
        ([], {"processes": -1}, ["--processes", "from 0"]),
        ([], {"processes": 2, "router": "token-rounding", "tile": 33}, ["--tile 33", "32 tokens"]),
    ],
)
def test_what_contradicts_is_refused_before_anything_starts(
    refuse, flags, tmp_path, monkeypatch, switches, changes, words
):
    monkeypatch.setattr(subprocess, "Popen", lambda *unused, **options: pytest.fail("started"))
    refuse(flags(*switches, **changes), *words)
    assert os.listdir(tmp_path) == ["text"]


def test_torchrun_says_how_many(refuse, flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert parse_train(list(map(str, flags()))).layout.size == 2
    refuse(flags(processes=4), "--processes 4", "the 2 processes of torchrun")
    monkeypatch.setenv("RANK", "1")
    assert main(flags(ep=3)) == 2  # the first has told


def test_a_run_that_is_there_is_refused_before_anything_starts(refuse, flags, damaged, finished):
    before = contents(damaged)
    refuse(flags(processes=2, data=finished / "text"), "exists", "--resume")
    refuse([*flags("--resume", ep=3)[-3:], "--name", "run", "--runs-dir", damaged.parent], "--ep 3")
    assert contents(damaged) == before


def test_a_file_of_settings_may_name_the_layout(flags, tmp_path):
    (tmp_path / "run.yaml").write_text("processes: 2\nfsdp: true\nname: from-file\n")
    request = parse_train(["--config", str(tmp_path / "run.yaml"), "--ep", "2"])
    assert request.layout == Layout(processes=2, fsdp=True, ep=2)
    assert request.config.device == "cpu" and "device" in request.given


@pytest.mark.parametrize("page", ["training.md", "distributed.md"])
def test_commands_of_the_pages_are_taken(page):
    text = " ".join((ROOT / "docs" / "guide" / page).read_text().split())
    commands = re.findall(r'make train ARGS="([^"]*(?:--gpus|--processes)[^"]*)"', text)
    assert commands
    for command in commands:
        assert parse_train(command.split()).layout.size > 1


# ------------------------------------------------------------------------------------- what ends it


def failed(code, timestamp):
    failure = object.__new__(ProcessFailure)
    vars(failure).update(exitcode=code, timestamp=timestamp)
    return failure


def test_the_process_that_was_killed_is_named_not_those_that_the_launcher_killed(tmp_path):
    config = TrainConfig(name="run", runs_dir=str(tmp_path))
    with pytest.raises(OSError, match="process 5 was ended by SIGKILL"):
        launch._told({0: failed(-9, 130), 5: failed(-9, 100), 6: failed(-15, 131)}, config)
    assert launch._told({0: failed(-9, 130), 3: failed(2, 100), 4: failed(1, 101)}, config) == 2


@pytest.mark.parametrize(
    "error, lost",
    [
        (RuntimeError("[/gloo/pair.cc] Connection closed by peer"), True),
        (RuntimeError("[/gloo/unbound_buffer.cc] Timed out waiting 1000ms"), False),
        (dist.DistBackendError("ncclRemoteError: ... or a remote process exiting"), True),
        (dist.DistBackendError("ncclSystemError: /dev/shm: No space left"), False),
        (ValueError("x"), False),
    ],
)
def test_a_connection_is_lost_when_its_other_end_is(error, lost):
    assert is_lost_connection(error) is lost


def test_a_launcher_may_send_its_signal_twice(monkeypatch):
    handler = signals.Signals()
    handler.deferred = True
    monkeypatch.setenv("RANK", "1")
    handler._handle(signal.SIGTERM, None)
    handler._handle(signal.SIGTERM, None)
    assert handler.received == signal.SIGTERM


def test_bfloat16_shards_have_no_copies_for_autocast():
    config = TrainConfig(name="x", dtype="bfloat16", batch_size=2)
    one, copies, shards = (
        Sizes(config, torch.device("cpu"), Layout(processes=count, fsdp=sharded)).numbers
        for count, sharded in ((1, False), (2, False), (2, True))
    )
    assert one.cast > 0 and shards.cast == 0
    assert shards.state == one.state / 2 and shards.gradient == one.gradient / 2
    assert copies.state == one.state + one.gradient and copies.gradient == 0


@pytest.fixture
def start(flags, run_dir):
    """Starts the trainer as a program; returns it with its processes when it has done steps."""
    begun = []

    def start(*switches, **changes):
        argv = flags(*switches, eval_every=1000, sample_tokens=None, **changes)
        command = [sys.executable, "-m", "trainer.train", *argv, "--sample-tokens", "0"]
        path = os.pathsep.join([str(ROOT / "bindings/torch"), str(ROOT)])
        program = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        begun.append(program)
        log = run_dir / "metrics.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < 3:
            assert program.poll() is None, program.communicate()
            time.sleep(0.01)
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        return program, {rank_of(child): int(child) for child in children}

    yield start
    for program in begun:
        program.kill()
        program.communicate()


def rank_of(process):
    pairs = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return int(dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)[b"RANK"])


def losses(run_dir):
    return [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl")]


def test_a_signal_saves_and_one_process_goes_on(flags, start, run_dir):
    program, ranks = start("--fsdp", processes=2, steps=120)
    assert ranks.keys() == {0, 1}
    program.send_signal(signal.SIGTERM)
    told, error = program.communicate(timeout=120)
    assert program.returncode == 143 and error == ""
    stopped = checkpoint.last_step(run_dir)
    assert f"stopped and saved at step {stopped}; --resume --name run" in told
    assert 3 <= stopped == len(losses(run_dir)) < 120
    line = read_metrics(run_dir / "metrics.jsonl")[0]
    assert line["rows_per_process"] == [128, 128.0, 128]
    assert line["tokens_per_second_per_process"] == pytest.approx(
        line["tokens_per_second"] / 2, abs=0.1
    )
    assert main(["--resume", "--name", "run", "--runs-dir", str(run_dir.parent)]) == 0
    assert main(flags(name="whole", steps=120, eval_every=1000, sample_tokens=0)) == 0
    assert losses(run_dir) == pytest.approx(losses(run_dir.parent / "whole"), rel=1e-3)


def test_a_killed_process_ends_all_with_one_line(start, run_dir):
    program, ranks = start(processes=2, ep=2, steps=400, save_every=1)
    os.kill(ranks[1], signal.SIGKILL)
    _, error = program.communicate(timeout=120)
    assert program.returncode == 1 and error.count("\n") == 1
    assert error.startswith("train: error: process 1 was ended by SIGKILL")
    good = checkpoint.last_step(run_dir)
    assert f"of step {good}, is kept; --resume --name run" in error
    restore.verify(run_dir)
    argv = ["--resume", "--name", "run", "--runs-dir", str(run_dir.parent)]
    assert main([*argv, "--steps", str(good + 2)]) == 0
    assert checkpoint.last_step(run_dir) == good + 2
    assert os.listdir(run_dir / "checkpoints") == [f"step-{good + 2:06d}"]
