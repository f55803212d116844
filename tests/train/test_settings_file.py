"""--config: the settings of a YAML file, checked as those of the command line, which come first."""

import json

import pytest

from trainer.compare import parse_compare
from trainer.config import TrainConfig
from trainer.request import parse_train
from trainer.schema import UserError
from trainer.train import main


@pytest.fixture
def write(tmp_path):
    def write(content):
        place = tmp_path / "run.yaml"
        place.write_text(content)
        return str(place)

    return write


def test_a_file_of_settings(write):
    place = write(
        "# the small one\nname: first\nsteps: 30\nlr: 3e-4\nweight_decay: 1\ndata: 'text/of mine'\n"
    )
    request = parse_train(["--config", place])
    assert request.config == TrainConfig(
        name="first", steps=30, lr=3e-4, weight_decay=1, data="text/of mine"
    )
    assert request.given == {"name", "steps", "lr", "weight_decay", "data"}


@pytest.mark.parametrize("first", ["--steps 40 --config {}", "--config {} --steps 40"])
def test_flags_come_before_the_file_wherever_they_stand(write, first):
    place = write("steps: 30\ntop_k: 2\n")
    config = parse_train([part.format(place) for part in first.split()]).config
    assert (config.steps, config.top_k) == (40, 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("steps: 0", "steps: expected a whole number from 1"),
        ("steps: many", "steps: expected a whole number from 1 .* got 'many'"),
        ("steps: 1e3", "steps: expected a whole number from 1 .* got 1000.0"),
        ("steps: yes", "steps: .* got True"),
        ("lr: -1e-3", "lr: expected a finite number above 0, got -0.001"),
        ("router: top-k", "router: expected one of topk, token-rounding, got 'top-k'"),
        ("stepz: 3", "'stepz' is no field"),
        ("batch-size: 3", "'batch-size' is no field"),
        ("steps: 3\nsteps: 4", "the same name twice"),
        ("- 3", "expected an object with fields"),
        ("", "expected an object with fields, got None"),
        ("steps: [", "cannot read .*run.yaml"),
        ("a: !!python/object:os.system {}", "cannot read .*run.yaml"),
        ("[" * 5000, "cannot read .*run.yaml"),
    ],
)
def test_what_is_wrong_in_it_is_one_line_with_its_name(write, content, words):
    place = write(content)
    with pytest.raises(UserError, match=f"(?s)^--config: .*{words}") as refusal:
        parse_train(["--config", place])
    assert "run.yaml" in str(refusal.value) and "\n" not in str(refusal.value)


def test_no_such_file(refuse, flags, tmp_path):
    refuse([*flags(), "--config", tmp_path / "none.yaml"], "--config", "none.yaml", "No such file")


def test_compare_takes_one_too(write):
    comparison = parse_compare(["--config", write("steps: 5\ntop_k: 2\n"), "--seeds", "1"])
    assert (comparison.config.steps, comparison.config.top_k) == (5, 2)
    with pytest.raises(UserError, match="--router"):
        parse_compare(["--config", write("router: topk\n")])


def test_the_settings_of_a_run_repeat_it(finished, tmp_path, text_folder, refuse):
    settings = finished / "runs" / "run" / "config.json"
    again = ["--config", str(settings), "--runs-dir", str(tmp_path / "runs"), "--name", "again"]
    assert main(again) == 0
    first, second = (
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (finished / "runs" / "run", tmp_path / "runs" / "again")
    )
    assert first == second and len(first) == 4
    (text_folder / "file0.txt").write_text("another text " * 200)
    refuse([*again[:-1], "other", "--data", text_folder], "has changed")
