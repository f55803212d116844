"""What runs out or goes wrong while it trains: one line, exit code 1, the last good checkpoint
kept."""

import errno
import io
import os
import resource
import signal
import sys

import pytest
import torch
from conftest import contents

from trainer import checkpoint, files, loop, prepare, program, restore, start, trainer
from trainer.metrics import read_metrics
from trainer.train import main


def hidden(folder):
    """Names of what is half-written, below the folder."""
    return [path.name for path in folder.rglob(".*") if path.name != ".metadata"]  # but of DCP


def resumes(run_dir):
    """Steps of the metrics after the run has gone on."""
    argv = ["--resume", "--name", "run", "--runs-dir", str(run_dir.parent)]
    assert main(argv) == 0
    return [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")]


# --------------------------------------------------------------------------------------------- disk


@pytest.fixture
def file_limit():
    """Sets how large a file may become, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", ["none", "some tensors", "most"])
def test_no_room_for_a_checkpoint(refuse, flags, run_dir, file_limit, monkeypatch, room):
    """The one of step 2 does not fit; what fits of it differs, and with that what the libraries
    raise."""
    write = checkpoint._write

    def fuller(folder, content, weights):
        if content.step == 2:
            sizes = {"none": 1, "some tensors": 60_000, "most": 200_000}
            file_limit(sizes[room])
        write(folder, content, weights)

    monkeypatch.setattr(checkpoint, "_write", fuller)
    refuse(flags(save_every=2), "step-000002", "File too large", "of step 0, is kept", code=1)
    file_limit(resource.RLIM_INFINITY)
    monkeypatch.undo()
    assert os.listdir(run_dir / "checkpoints") == ["step-000000"] and not hidden(run_dir)
    restore.verify(run_dir)
    assert resumes(run_dir) == [1, 2, 3, 4, 5, 6]


def test_no_room_for_the_first_checkpoint_leaves_nothing(refuse, flags, tmp_path, file_limit):
    file_limit(60_000)
    refuse(flags(), "step-000000", "File too large", "no checkpoint yet", code=1)
    assert os.listdir(tmp_path) == ["text"]


@pytest.mark.parametrize("moment", ["rename", "replace", "symlink", "fsync"])
def test_an_error_at_any_moment_of_a_save(refuse, flags, run_dir, monkeypatch, moment):
    save = checkpoint.save

    def failing(folder, content, group):
        if content.step == 4:
            call = getattr(os, moment)

            def once(*arguments, **options):
                monkeypatch.setattr(os, moment, call)
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(os, moment, once)
        save(folder, content, group)

    monkeypatch.setattr(checkpoint, "save", failing)
    refuse(flags(save_every=2), "No space left on device", code=1)
    monkeypatch.undo()
    assert checkpoint.last_step(run_dir) == 2
    assert resumes(run_dir) == [1, 2, 3, 4, 5, 6] and not hidden(run_dir)


@pytest.mark.parametrize("name", ["metrics.jsonl", "memory.json", "loss.png", "sample.txt"])
def test_no_room_for_a_file_of_the_run(refuse, flags, run_dir, monkeypatch, file_limit, name):
    """Too small from the second step on, or from the moment the file is written."""
    step, replacing = trainer.Trainer.train_step, files.replacing

    def full_after_step_two(self):
        file_limit(300 if self.step == 2 else resource.RLIM_INFINITY)
        return step(self)

    def full(path):
        if path.name == name:
            file_limit(1)
        return replacing(path)

    if name == "metrics.jsonl":
        monkeypatch.setattr(trainer.Trainer, "train_step", full_after_step_two)
    else:
        monkeypatch.setattr(files, "replacing", full)
    refuse(flags(eval_every=100), f"{name}: File too large", code=1)
    file_limit(resource.RLIM_INFINITY)
    monkeypatch.undo()
    assert not hidden(run_dir)
    assert resumes(run_dir) == [1, 2, 3, 4, 5, 6]


def test_no_room_for_tokens_leaves_what_was_there(refuse, text_folder, tmp_path, file_limit):
    argv = [
        text_folder,
        "--output",
        tmp_path / "t.bin",
        "--vocab-size",
        "300",
        "--suffixes",
        ".txt",
    ]
    assert prepare.main(list(map(str, argv))) == 0
    before = contents(tmp_path)
    for size in (100, len(before["t.bin"]) - 100):
        file_limit(size)
        refuse(argv, "File too large", entry=prepare.main, code=1)
        file_limit(resource.RLIM_INFINITY)
        assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------- output


class Closed(io.StringIO):
    """Takes some lines, then fails as a pipe without a reader or a full disk does."""

    def __init__(self, lines, error):
        super().__init__()
        self.lines, self.error = lines, error

    def write(self, text):
        self.lines -= text.count("\n")
        if self.lines < 0:
            raise self.error
        return super().write(text)


BROKEN = [
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
]


@pytest.mark.parametrize("error", BROKEN, ids=lambda error: error.strerror)
@pytest.mark.parametrize("lines", [0, 3, 7])
def test_steps_are_saved_when_nobody_takes_the_output(
    refuse, flags, run_dir, monkeypatch, lines, error
):
    monkeypatch.setattr(program, "drop_output", lambda: None)
    monkeypatch.setattr(sys, "stdout", Closed(lines, error))
    refuse(flags(save_every=100), error.strerror, "stopped and saved at step", code=1)
    monkeypatch.undo()
    done = read_metrics(run_dir / "metrics.jsonl")
    assert checkpoint.last_step(run_dir) == len(done) > 0
    assert resumes(run_dir) == [1, 2, 3, 4, 5, 6]


def test_output_that_ends_after_the_last_step_is_noticed(refuse, flags, run_dir, monkeypatch):
    finish = loop.Run.finish

    def late(self):
        monkeypatch.setattr(sys, "stdout", Closed(0, BROKEN[0]))
        finish(self)

    monkeypatch.setattr(program, "drop_output", lambda: None)
    monkeypatch.setattr(loop.Run, "finish", late)
    refuse(flags(), "cannot write the output: Broken pipe", code=1)
    assert checkpoint.last_step(run_dir) == 6 and (run_dir / "summary.json").exists()


def test_results_that_nobody_takes_are_noticed(refuse, text_folder, tmp_path, monkeypatch):
    argv = [
        text_folder,
        "--output",
        tmp_path / "t.bin",
        "--vocab-size",
        "300",
        "--suffixes",
        ".txt",
    ]
    monkeypatch.setattr(program, "drop_output", lambda: None)
    monkeypatch.setattr(sys, "stdout", Closed(0, BROKEN[1]))
    refuse(argv, "cannot write the output: No space", entry=prepare.main, code=1)


@pytest.mark.parametrize("signals", [[signal.SIGHUP], [signal.SIGHUP] * 2, [signal.SIGTERM]])
def test_a_signal_saves(flags, run_dir, monkeypatch, signals):
    """A terminal that closes may send SIGHUP twice."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where nohup runs the tests
    step = trainer.Trainer.train_step

    def stopped(self):
        for number in signals:
            os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", stopped)
    try:
        assert main(flags()) == 128 + signals[0]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint.last_step(run_dir) == 1


def test_nohup_is_left_alone(flags, run_dir, monkeypatch):
    step = trainer.Trainer.train_step

    def hung_up(self):
        os.kill(os.getpid(), signal.SIGHUP)
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(flags()) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint.last_step(run_dir) == 6


# --------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("experts", ["sonicmoe_cpp", "eager", "grouped_mm"])
@pytest.mark.parametrize(
    ("eval_every", "where"), [(1, "validation after step 1: "), (9, "step 2: ")]
)
def test_divergence_is_one_line(refuse, flags, run_dir, experts, eval_every, where):
    changes = {"experts": experts, "eval_every": eval_every, "lr": 1e15, "warmup": 0}
    error = refuse(flags(grad_clip=1e30, **changes), "of step 0, is kept", code=1)
    assert f"error: {where}" in error and "nan" in error.lower()
    restore.verify(run_dir)
    lines = (run_dir / "metrics.jsonl").read_text()
    assert "nan" not in lines.lower() and "inf" not in lines.lower()


@pytest.mark.parametrize("policy", ["stochastic", "nearest_score"])
def test_divergence_under_token_rounding(refuse, flags, policy):
    changes = {"router": "token-rounding", "policy": policy, "lr": 1e15, "warmup": 0}
    refuse(flags(grad_clip=1e30, eval_every=9, **changes), "error: step 2: ", "NaN", code=1)


def test_a_gradient_that_is_not_finite_changes_no_weight(refuse, flags, run_dir, monkeypatch):
    forward, kept = trainer.Trainer.forward, []

    def diverging(self, part=0):
        loss, aux = forward(self, part)
        if self.step == 2:
            weight = next(self.model.parameters())
            kept.extend([self.model, {k: v.clone() for k, v in self.model.state_dict().items()}])
            loss = loss + (weight * torch.inf).sum() * 0
        return loss, aux

    monkeypatch.setattr(trainer.Trainer, "forward", diverging)
    refuse(flags(save_every=2), "error: step 3: ", "of step 2, is kept", code=1)
    model, before = kept
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_are_not_finite_replace_no_checkpoint(refuse, flags, run_dir):
    argv = flags(lr=1e308, warmup=0, save_every=1, eval_every=9)
    refuse(argv, "error: step 1: the weights are no longer finite", "of step 0, is kept", code=1)
    assert os.listdir(run_dir / "checkpoints") == ["step-000000"]


def test_no_rows_at_all(flags, run_dir):
    """Rounding down with a tile above every expert's share drops all rows, and no share is NaN."""
    assert main(flags(router="token-rounding", policy="down", tile=64)) == 0
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert {line["rows"] for line in lines} == {0} and lines[-1]["expert_shares"][0][0] == 0


# ------------------------------------------------------------------------- memory, threads and more


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("no room"),
        RuntimeError("CUDA out of memory. sonicmoe_cpp could not"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_names_the_sizes(refuse, flags, monkeypatch, raised):
    def too_large(self):
        self.doing = "step 1"
        raise raised

    monkeypatch.setattr(trainer.Trainer, "train_step", too_large)
    error = refuse(flags(), "error: step 1: ", "2 sequences of 32 tokens", "H [128, 32]", code=1)
    assert "largest microbatch by formula is" in error and "of step 0, is kept" in error


def test_no_memory_for_the_model(refuse, flags, tmp_path, monkeypatch):
    def too_large(*unused):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(start, "new_model", too_large)
    refuse(flags(), "2 sequences of 32 tokens", "weights and optimizer", code=1)
    assert os.listdir(tmp_path) == ["text"]


PanicException = type("PanicException", (BaseException,), {})


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("can't start new thread"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        PanicException("The global thread pool has not been initialized"),
        ImportError("sonicmoe_cpp: _C.so is missing"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["train_tokenizer", "encode"])
def test_other_failures_are_one_line(refuse, flags, tmp_path, monkeypatch, raised, place):
    def failing(*unused):
        raise raised

    monkeypatch.setattr(trainer.data, place, failing)
    refuse(flags(), str(raised.args[-1]), code=1)
    assert os.listdir(tmp_path) == ["text"]


def test_a_fault_of_the_program_stays_a_traceback(flags, monkeypatch):
    monkeypatch.setattr(trainer.data, "encode", lambda *unused: None.shape)
    with pytest.raises(AttributeError):
        main(flags())
