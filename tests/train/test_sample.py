"""python -m trainer.sample: text from the checkpoint of a run."""

import pytest

from trainer.sample import main


def write(finished, capsys, *flags):
    capsys.readouterr()
    assert main(["--runs-dir", str(finished / "runs"), "--tokens", "12", *flags]) == 0
    return capsys.readouterr().out


def test_the_text_begins_with_the_prompt_and_goes_on(finished, capsys):
    text = write(finished, capsys, "--prompt", "the expert")
    assert text.startswith("the expert") and len(text) > len("the expert\n")
    assert write(finished, capsys, "--prompt", "the expert") == text
    assert write(finished, capsys, "--prompt", "the expert", "--seed", "1") != text
    longer = write(finished, capsys, "--prompt", "the expert", "--tokens", "24")
    assert longer.startswith(text[:-1]) and len(longer) > len(text)


def test_it_is_what_the_trainer_samples(finished, capsys):
    told = (finished / "runs" / "run" / "sample.txt").read_text()
    flags = ["--prompt", "def ", "--tokens", "8", "--name", "run"]
    assert write(finished, capsys, *flags) == told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--name", "none"], ["--name", "no run"]),
        (["--name", "../run"], ["--name"]),
        (["--tokens", "0"], ["--tokens", "from 1"]),
        (["--temperature", "0"], ["--temperature", "above 0"]),
        (["--prompt", "p" * 5000], ["--prompt"]),
        (["--runs-dir", "/no/such"], ["no run in /no/such"]),
    ],
)
def test_bad_requests(refuse, finished, flags, words):
    refuse(["--runs-dir", finished / "runs", *flags], *words, entry=main)


def test_a_damaged_checkpoint_is_named(refuse, damaged):
    weights = damaged / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    refuse(["--runs-dir", damaged.parent], "--name", "model.safetensors", "damaged", entry=main)
