"""Bad input: one clear line on stderr, exit code 2, nothing written or changed."""

import json

import pytest
import torch
from pretrain.compare import main as compare
from pretrain.train import main


def tree(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def expect_error(capsys, argv, *words, entry=main):
    assert entry(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error:" in error and "Traceback" not in error
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "/no/such/file"}, ["--data", "no such file"]),
        ({"nonsense": 3}, ["--nonsense"]),
        ({"steps": 0}, ["--steps"]),
        ({"steps": "many"}, ["--steps"]),
        ({"router": "token-rounding", "tile": 65}, ["--tile 65", "64 tokens"]),
        ({"router": "token-rounding", "experts": "eager"}, ["token-rounding", "eager"]),
        ({"seq_len": 100_000}, ["shorter than a batch"]),
        ({"top_k": 9}, ["--top-k 9"]),
        ({"name": "../up"}, ["--name"]),
        ({"vocab_size": 100}, ["--vocab-size"]),
        pytest.param(
            {"device": "cuda"},
            ["--device cuda"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_request_is_one_line_and_writes_nothing(capsys, flags, tmp_path, changes, words):
    expect_error(capsys, flags(**changes), *words)
    assert not list(tmp_path.glob("runs/*"))


def test_empty_text(capsys, flags, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    expect_error(capsys, flags(data=empty), "empty")
    folder = tmp_path / "nothing"
    folder.mkdir()
    expect_error(capsys, flags(data=folder), "empty")


def test_existing_run_is_kept(capsys, flags, tmp_path, run_dir):
    assert main(flags(experts="eager")) == 0
    before = tree(run_dir)
    capsys.readouterr()
    expect_error(capsys, flags(experts="eager"), "exists", "--resume")
    expect_error(capsys, flags("--overwrite", data="/no/such/file"), "no such file")
    expect_error(capsys, flags("--resume", hidden_size=64), "--hidden-size is 64")
    fields = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**fields, "num_experts": 16}))
    changed = tree(run_dir)
    shape = {"num_experts": None, "experts": "eager"}
    expect_error(capsys, flags("--resume", **shape), "num_experts 8", "16")
    assert tree(run_dir) == changed
    assert {k: v for k, v in changed.items() if k != "config.json"} == {
        k: v for k, v in before.items() if k != "config.json"
    }


def test_resume_without_a_run(capsys, flags):
    expect_error(capsys, flags("--resume"), "no run")


def test_compare_refuses_an_unknown_policy(capsys, flags):
    expect_error(capsys, flags("--policies", "nearest,up,nearest"), "--policies", entry=compare)
    expect_error(capsys, flags("--policies", "sideways"), "--policies sideways", entry=compare)


def test_compare_refuses_a_router(capsys, flags):
    expect_error(capsys, flags(router="topk"), "--router", entry=compare)
