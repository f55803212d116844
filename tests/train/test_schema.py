"""One schema: what a flag refuses, config.json refuses too, and the other way round."""

import dataclasses
import json

import pytest

from trainer.config import RULES, TrainConfig, read_config, validate
from trainer.request import parse_train
from trainer.schema import UserError, check_fields, flag_of, list_of, number, text, whole

SETTINGS = {**dataclasses.asdict(TrainConfig(name="run")), "data_digest": "0" * 64}
FOREIGN = [None, True, [], {}, [3], "many", "\ud800", "x" * 5000, -1, 2.5, 2**70, 1e300, ""]


def config_json(tmp_path, fields):
    place = tmp_path / "run" / "config.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(fields))
    return place.parent


def test_the_defaults_are_settings(tmp_path):
    config, digest = read_config(config_json(tmp_path, SETTINGS))
    assert config == TrainConfig(name="run") and digest == "0" * 64


@pytest.mark.parametrize("field", SETTINGS)
def test_every_field_of_config_json_is_checked(tmp_path, field):
    """Each foreign value is refused by the field's name, unless its rule takes it."""
    refused = 0
    for value in FOREIGN:
        if field in RULES and RULES[field].accepts(value):
            continue
        with pytest.raises(UserError, match=rf"config\.json: {field}: expected .*, got "):
            read_config(config_json(tmp_path, {**SETTINGS, field: value}))
        refused += 1
    assert refused >= 6
    missing = {name: value for name, value in SETTINGS.items() if name != field}
    with pytest.raises(UserError, match=f"{field} is missing"):
        read_config(config_json(tmp_path, missing))


@pytest.mark.parametrize("field", sorted(RULES.keys() - {"name", "runs_dir", "data"}))
def test_every_flag_is_checked_by_the_same_rule(field):
    default = getattr(TrainConfig(), field)
    for value in ("many", "\ud800", "x" * 5000, "-1", "2.5", "nan", "inf", "1e400", "9" * 5000):
        argv = ["--name", "run", f"{flag_of(field)}={value}"]
        try:
            given = getattr(parse_train(argv).config, field)
        except UserError as error:
            told = str(error)
            assert told.startswith(f"{flag_of(field)}") and "\n" not in told and len(told) < 400
        else:
            assert RULES[field].accepts(given) and type(given) is type(default)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting"),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        (b"\xff", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"steps": NaN}', "NaN is no number"),
        (b'{"steps": 1, "steps": 2}', "the same name twice"),
        (json.dumps({**SETTINGS, "speed": 1}).encode(), "'speed' is no field"),
        (json.dumps({**SETTINGS, "top_k": 33}).encode(), "top_k 33 is more than"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, words):
    folder = config_json(tmp_path, {})
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_config(folder)


def test_rules():
    assert whole(1, 9).accepts(9) and not whole(1, 9).accepts(10) and not whole().accepts(True)
    assert number(above=True).accepts(1e-300) and not number(above=True).accepts(0)
    assert not any(map(number().accepts, (float("nan"), float("inf"), 10**400, "1", None)))
    assert text(most=2).accepts("é\n") and not any(map(text(most=2).accepts, ("abc", "\0", 3)))
    assert list_of(whole()).accepts([0, 1]) and not any(
        map(list_of(whole()).accepts, ([], [1, "2"], (1,), {1: 1}))
    )


def test_fields_are_exactly_those():
    rules = {"a": whole(), "b": whole()}
    assert check_fields(rules, {"a": 1}, "f", optional={"b"}) == {"a": 1}
    for fields, words in (({"b": 1}, "a is missing"), ({"a": 1, "c": 2}, "'c' is no field")):
        with pytest.raises(UserError, match=f"f: {words}"):
            check_fields(rules, fields, "f", optional={"b"})


def test_settings_that_do_not_fit_each_other():
    with pytest.raises(UserError, match="--hidden-size 36"):
        validate(TrainConfig(name="run", hidden_size=36))
    with pytest.raises(UserError, match="run.json: tile 2000 is larger"):
        validate(TrainConfig(name="run", router="token-rounding", tile=2000), "run.json")
