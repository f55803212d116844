"""Bad requests: one clear line on stderr, exit code 2, nothing written or changed."""

import json
import os

import pytest
import torch
from conftest import contents

from trainer import checkpoint, files
from trainer.compare import main as compare
from trainer.train import main

NO_UTF8 = os.fsdecode(b"x\xff")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "/no/such/file"}, ["--data", "no such file"]),
        ({"data": "/dev/zero"}, ["--data /dev/zero", "Not a regular file"]),
        ({"data": "t" * 5000}, ["--data", "no such file"]),
        ({"nonsense": 3}, ["--nonsense"]),
        ({"steps": 0}, ["--steps", "from 1"]),
        ({"steps": "many"}, ["--steps", "'many'"]),
        ({"steps": "9" * 5000}, ["--steps"]),
        ({"lr": "nan"}, ["--lr", "'nan'"]),
        ({"router": "token-rounding", "tile": 65}, ["--tile 65", "64 tokens"]),
        ({"router": "token-rounding", "experts": "eager"}, ["token-rounding", "eager"]),
        ({"seq_len": 100_000}, ["shorter than a batch"]),
        ({"top_k": 9}, ["--top-k 9"]),
        ({"vocab_size": 100}, ["--vocab-size"]),
        ({"name": "../up"}, ["--name"]),
        ({"name": ""}, ["--name"]),
        ({"name": "n" * 129}, ["--name", "at most 128"]),
        ({"sample_prompt": NO_UTF8}, ["--sample-prompt", "UTF-8"]),
        ({"sample_prompt": "p" * 4097}, ["--sample-prompt"]),
        ({"runs_dir": NO_UTF8}, ["--runs-dir", "UTF-8"]),
        ({"runs_dir": "/dev/null"}, ["--runs-dir", "Not a directory"]),
        ({"runs_dir": "/proc/runs"}, ["--runs-dir", "No such file"]),
        ({"runs_dir": "r" * 300}, ["--runs-dir", "too long"]),
        ({"batch_size": 2_000_000_000}, ["2000000000 sequences", "largest microbatch"]),
        ({"num_experts": 2_000_000_000}, ["weights and optimizer"]),
        pytest.param(
            {"device": "cuda"},
            ["--device cuda"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_request_is_one_line_and_writes_nothing(refuse, flags, tmp_path, changes, words):
    refuse(flags(**changes), *words)
    assert os.listdir(tmp_path) == ["text"]


def test_what_cannot_be_written_to_is_refused_before_the_text_is_read(refuse, flags, tmp_path):
    (tmp_path / "file").write_text("x")
    refuse(flags(runs_dir=tmp_path / "file", data="/no/such/file"), "--runs-dir")
    refuse(flags(runs_dir=tmp_path / "file" / "runs", data="/no/such/file"), "--runs-dir")


def test_empty_text(refuse, flags, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    refuse(flags(data=empty), "empty")
    folder = tmp_path / "nothing"
    folder.mkdir()
    refuse(flags(data=folder), "empty")


def test_existing_run_is_kept(refuse, flags, damaged, finished):
    before = contents(damaged)
    text = {"data": finished / "text"}
    refuse(flags(**text), "exists", "--resume")
    refuse(flags("--overwrite", data="/no/such/file"), "no such file")
    refuse(flags("--resume", hidden_size=64, **text), "--hidden-size is 64")
    with checkpoint.exclusive(damaged):
        refuse(flags("--overwrite", data="/no/such/file"), "another process")
        refuse(flags("--resume", vocab_size=None, **text), "another process")
    assert contents(damaged) == before


@pytest.mark.parametrize("link", ["checkpoints/step-000004", "nowhere", None])
def test_a_folder_that_is_no_run_is_not_overwritten(refuse, flags, run_dir, link):
    run_dir.mkdir(parents=True)
    (run_dir / "notes.txt").write_text("mine")
    if link == "nowhere":
        (run_dir / "config.json").write_text("{}")
    if link:
        (run_dir / "checkpoint").symlink_to(link)
    before = contents(run_dir)
    refuse(flags("--overwrite"), "is not a run")
    assert contents(run_dir) == before


def test_resume_without_a_run(refuse, flags):
    refuse(flags("--resume"), "no run")
    refuse(flags("--resume", name=None), "no run")
    refuse(flags("--resume", name=None, runs_dir="r" * 300), "--resume", "too long")


@pytest.mark.parametrize("kind", ["new", "old"])
def test_what_a_killed_start_left_is_no_run_and_is_removed(flags, damaged, capsys, kind):
    left = damaged.parent / f".other.{kind}-abcd1234"
    place = left if kind == "new" else left / "run"
    checkpoint.shutil.copytree(damaged, place, symlinks=True)
    newer = os.lstat(damaged / "checkpoint").st_mtime + 60
    os.utime(place / "checkpoint", (newer, newer), follow_symlinks=False)
    argv = ["--resume", "--runs-dir", str(damaged.parent), "--steps", "5"]
    assert main(argv) == 0, capsys.readouterr().err
    assert checkpoint.last_step(damaged) == 5 and not left.exists()


def test_a_run_to_be_replaced_gets_its_name_back(flags, damaged):
    """Killed between the two renames of --overwrite."""
    left = damaged.parent / ".run.old-abcd1234"
    left.mkdir()
    damaged.rename(left / "run")
    argv = ["--resume", "--name", "run", "--runs-dir", str(damaged.parent), "--steps", "5"]
    assert main(argv) == 0
    assert checkpoint.last_step(damaged) == 5 and not left.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policies": "nearest,up,nearest"}, ["--policies"]),
        ({"policies": "sideways"}, ["--policies sideways"]),
        ({"policies": ""}, ["--policies"]),
        ({"router": "topk"}, ["--router"]),
        ({"experts": "eager"}, ["--experts sonicmoe_cpp"]),
        ({"seeds": 10**9}, ["--seeds"]),
        ({"jobs": 10**9}, ["--jobs"]),
        ({"seed": 2**32 - 1, "seeds": 2}, ["--seed"]),
        ({"only": "../x"}, ["--only"]),
        ({"name": "../out"}, ["--name"]),
        ({"name": "/tmp/out"}, ["--name"]),
        ({"name": "a\nb"}, ["--name"]),
        ({"name": ""}, ["--name"]),
        ({"runs_dir": "/dev/null", "jobs": 2}, ["/dev/null"]),
    ],
)
def test_compare_refuses(refuse, flags, tmp_path, changes, words):
    refuse(flags(**changes), *words, entry=compare)
    assert os.listdir(tmp_path) == ["text"]


def test_json_is_read_strictly(tmp_path):
    assert files.parse_json(b'\xef\xbb\xbf{"a": [1, 2.5]}') == {"a": [1, 2.5]}
    for content in (
        b'{"a": NaN}',
        b"[1e5, Infinity]",
        b'{"a": 1, "a": 2}',
        b"\xff\xfe",
        b"1" * 5000,
    ):
        with pytest.raises(ValueError):
            files.parse_json(content)
    with pytest.raises(RecursionError):
        files.parse_json(b"[" * 100_000)
    assert json.loads("[1]") == files.parse_json(b"[1]")
