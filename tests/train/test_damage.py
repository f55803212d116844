"""Runs that were edited, cut or damaged: --resume names the file in one line and changes
nothing."""

import hashlib
import json
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import contents
from safetensors.torch import load_file, save_file

from trainer import checkpoint, files
from trainer.metrics import read_metrics
from trainer.train import main

FILES = [
    "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors",
    "optimizer/.metadata", "optimizer/__0_0.distcp", "tokenizer.json", "tokenizer_config.json",
    "trainer.json",
]  # fmt: skip


@pytest.fixture
def resume(damaged):
    return ["--resume", "--name", "run", "--runs-dir", damaged.parent, "--steps", "6"]


@pytest.fixture
def refuse_unchanged(refuse, damaged, resume):
    def check(*words, code=2):
        before = contents(damaged)
        refuse(resume, *words, code=code)
        assert contents(damaged) == before

    return check


def saved(run):
    return run / os.readlink(run / "checkpoint")


def sign(run):
    """Writes the sums anew, as somebody would who means to change a checkpoint."""
    (saved(run) / "SHA256SUMS").unlink()
    sums = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(saved(run))}\n"
        for path in files.below(saved(run))
    ]
    (saved(run) / "SHA256SUMS").write_text("".join(sums))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def replaced(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


DAMAGE = {
    "flipped": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "folder": replaced(os.mkdir),
    "pipe": replaced(os.mkfifo),
    "loop": replaced(lambda path: path.symlink_to(path.name)),
    "device": replaced(lambda path: path.symlink_to("/dev/zero")),
}


def test_a_checkpoint_is_these_files_and_its_sums_are_theirs(finished):
    folder = saved(finished / "runs" / "run")
    assert [str(path.relative_to(folder)) for path in files.below(folder)] == FILES
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_of_a_checkpoint_is_noticed(damaged, refuse_unchanged, name, how):
    DAMAGE[how](saved(damaged) / name)
    refuse_unchanged("--resume", "checkpoint")


@pytest.mark.parametrize("how", [*DAMAGE, "sparse"])
def test_damage_to_the_settings_is_noticed(damaged, refuse_unchanged, how):
    damage = {**DAMAGE, "sparse": lambda path: os.truncate(path, 1 << 40)}[how]
    damage(damaged / "config.json")
    refuse_unchanged("--resume", "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_experts", 16), ("lr", 0.5), ("seq_len", 16), ("dtype", "bfloat16"), ("layers", 1000),
     ("data_digest", "1" * 64), ("vocab_size", 300), ("router", "token-rounding")],
)  # fmt: skip
def test_settings_other_than_those_trained_with_are_noticed(
    damaged, refuse_unchanged, field, value
):
    place = damaged / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), field: value}))
    refuse_unchanged(f"config.json: {field}: expected", "with which the checkpoint was made")


def test_text_may_move(damaged, resume, text_folder):
    place = damaged / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "data": str(text_folder)}))
    assert main(list(map(str, resume))) == 0


def test_a_foreign_file_in_a_checkpoint_is_named(damaged, refuse_unchanged):
    (saved(damaged) / "adapter_config.json").write_text("{}")
    refuse_unchanged("adapter_config.json", "not in SHA256SUMS")


def link(target):
    def damage(run):
        (run / "checkpoint").unlink()
        if target:
            (run / "checkpoint").symlink_to(target)

    return damage


def real_folder(run):
    folder = saved(run)
    (run / "checkpoint").unlink()
    folder.rename(run / "checkpoint")


def another_step(run):
    saved(run).rename(run / "checkpoints" / "step-000002")
    link("checkpoints/step-000002")(run)


@pytest.mark.parametrize(
    "damage",
    [link(None), link("checkpoint"), link("../run/checkpoints/step-000004"), link("/tmp"),
     link("checkpoints/step-000009"), real_folder, another_step],
)  # fmt: skip
def test_a_link_to_elsewhere_is_refused(damaged, refuse_unchanged, damage):
    damage(damaged)
    refuse_unchanged("--resume", "checkpoint")


def test_what_lies_beside_the_checkpoints_is_kept(damaged, resume):
    (damaged / "checkpoints" / "notes").mkdir()
    (damaged / "checkpoints" / "step-list.txt").write_text("mine")
    (damaged / "checkpoints" / ".writing-abc").mkdir()
    assert main(list(map(str, resume))) == 0
    there = ["notes", "step-000006", "step-list.txt"]
    assert sorted(os.listdir(damaged / "checkpoints")) == there


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.update(step="4"), "step: expected"),
        (lambda state: state.update(step=-3), "step: expected"),
        (lambda state: state.update(step=3), "step: expected 4"),
        (lambda state: state.update(settings=[]), "settings: expected"),
        (lambda state: state.update(speed=3), "'speed' is no field"),
        (lambda state: state.pop("step"), "step is missing"),
    ],
)
def test_a_signed_state_of_wrong_content(damaged, refuse_unchanged, change, words):
    place = saved(damaged) / "trainer.json"
    state = json.loads(place.read_text())
    change(state)
    place.write_text(json.dumps(state))
    sign(damaged)
    refuse_unchanged("trainer.json", words)


def test_a_checkpoint_of_an_earlier_version_is_named(damaged, refuse_unchanged):
    (saved(damaged) / "trainer.json").rename(saved(damaged) / "trainer.pt")
    sign(damaged)
    refuse_unchanged("an earlier version of the trainer", "trainer.pt")


NORM, HEAD = "model.norm.weight.exp_avg", "lm_head.weight.exp_avg_sq"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda moments: moments.clear(), "is missing"),
        (lambda moments: moments.pop(HEAD), f"{HEAD} is missing"),
        (lambda moments: moments.update(more=torch.zeros(2)), "more is too much"),
        (lambda moments: moments.update({HEAD: torch.zeros(1)}), f"{HEAD}: expected float32"),
        (lambda moments: moments.update({NORM: moments[NORM].int()}), f"{NORM}: expected float32"),
        (lambda moments: moments.update({NORM: [0.0]}), f"{NORM}"),
        (lambda moments: moments[HEAD].fill_(torch.nan), f"{HEAD} holds what is not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of DCP, without processes
def test_signed_moments_of_wrong_content(damaged, refuse_unchanged, change, words):
    folder = saved(damaged) / "optimizer"
    there = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    moments = {name: torch.empty(kind.size) for name, kind in there.items()}
    dcp.load(moments, checkpoint_id=folder, no_dist=True)
    change(moments)
    dcp.save(moments, checkpoint_id=folder, no_dist=True)
    sign(damaged)
    refuse_unchanged("optimizer: ", words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("lm_head.weight"), "missing keys such as lm_head.weight"),
        (lambda weights: weights.update(more=torch.zeros(2)), "unexpected keys such as more"),
        (lambda weights: weights.update({"lm_head.weight": torch.zeros(2, 2)}), "mismatched keys"),
        (lambda weights: weights["lm_head.weight"].fill_(torch.nan), "lm_head.weight holds"),
    ],
)
def test_signed_weights_of_wrong_content(damaged, refuse_unchanged, change, words):
    place = saved(damaged) / "model.safetensors"
    weights = load_file(place)
    change(weights)
    save_file(weights, place, metadata={"format": "pt"})
    sign(damaged)
    refuse_unchanged("weights", words)


def test_no_model_is_built_from_the_checkpoints_own_configuration(damaged, resume):
    """That of 30 billion parameters, or of code from elsewhere, is not looked at."""
    place = saved(damaged) / "config.json"
    fields = json.loads(place.read_text())
    place.write_text(
        json.dumps({**fields, "hidden_size": 1 << 20, "auto_map": {"AutoConfig": "x.y"}})
    )
    sign(damaged)
    assert main(list(map(str, resume))) == 0


# ------------------------------------------------------------------------------------------ metrics


def edited(change):
    """Of the lines, as a list of bytes without their ends."""

    def damage(path):
        lines = path.read_bytes().splitlines()
        path.write_bytes(b"".join(line + b"\n" for line in change(lines)))

    return damage


def replace(index, old, new):
    return edited(
        lambda lines: [*lines[:index], lines[index].replace(old, new), *lines[index + 1 :]]
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (DAMAGE["empty"], "ends at step 0"),
        (lambda path: os.truncate(path, path.stat().st_size - 20), "ends at step 3"),
        (edited(lambda lines: lines[:2]), "ends at step 2"),
        (edited(lambda lines: [lines[0], b"{", *lines[2:]]), "line 2"),
        (edited(lambda lines: [b"", *lines]), "line 1"),
        (edited(lambda lines: [b"[" * 100_000]), "line 1: nested too deeply"),
        (edited(lambda lines: [b"\xff", *lines]), "line 1"),
        (edited(lambda lines: [lines[0]] * 4), "line 2: step: expected 2, got 1"),
        (edited(lambda lines: lines[::-1]), "line 2: step: expected 5, got 3"),
        (replace(1, b'"loss": ', b'"loss": NaN, "was": '), "line 2: NaN"),
        (replace(1, b'"loss": ', b'"loss": "high", "was": '), "line 2: loss"),
        (replace(2, b'"step": 3', b'"step": 3.0'), "line 3: step"),
        (replace(2, b'"val_loss"', b'"valloss"'), "line 3: 'valloss' is no field"),
        (replace(2, b'"expert_shares": [[', b'"expert_shares": [[2, '), "expert_shares: expected"),
        (DAMAGE["folder"], "Is a directory"),
        (DAMAGE["pipe"], "Not a regular file"),
        (DAMAGE["loop"], "symbolic links"),
    ],
)
def test_damaged_metrics_are_named(damaged, refuse_unchanged, damage, words):
    damage(damaged / "metrics.jsonl")
    refuse_unchanged("metrics.jsonl", words)


@pytest.mark.parametrize(
    ("damage", "first"),
    [
        (DAMAGE["gone"], 5),  # whoever removes it goes on without its lines
        (lambda path: path.write_bytes(path.read_bytes() + b"\0" * 4096), 1),
        (lambda path: path.write_bytes(path.read_bytes() + b'{"step": 5, "lo'), 1),
        (lambda path: path.write_bytes(path.read_bytes() + b"3\n"), 1),
    ],
)
def test_what_came_after_the_checkpoint_does_not_count(damaged, resume, damage, first):
    damage(damaged / "metrics.jsonl")
    assert main(list(map(str, resume))) == 0
    steps = [line["step"] for line in read_metrics(damaged / "metrics.jsonl")]
    assert steps == list(range(first, 7))


def test_a_link_is_replaced_and_not_written_through(damaged, resume, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".config.json.tmp", "sample.txt", ".metrics.jsonl.tmp"):
        (damaged / name).unlink(missing_ok=True)
        (damaged / name).symlink_to(victim)
    assert main(list(map(str, resume))) == 0
    assert victim.read_text() == "mine" and (damaged / "sample.txt").stat().st_size > 0


@pytest.mark.parametrize("steps", [3, 4])
def test_no_steps_left(damaged, capsys, steps):
    """After a step without a validation, too: the run ends with one."""
    lines = (damaged / "metrics.jsonl").read_text().splitlines()
    fields = json.loads(lines[-1])
    del fields["val_loss"], fields["expert_shares"]
    (damaged / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(fields)]) + "\n")
    (damaged / "summary.json").unlink()
    argv = ["--resume", "--name", "run", "--runs-dir", str(damaged.parent), "--steps", str(steps)]
    assert main(argv) == 0
    assert "all steps are done" in capsys.readouterr().out
    summary = json.loads((damaged / "summary.json").read_text())
    assert summary["step"] == 4 == checkpoint.last_step(damaged) and summary["val_loss"] > 1
