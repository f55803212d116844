"""What a command line asks for."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from . import layout
from .config import (
    CHANGEABLE_ON_RESUME,
    DIGEST,
    RULES,
    TrainConfig,
    latest_run,
    read_config,
    validate,
)
from .layout import Layout
from .schema import Parser, Rule, UserError, check_fields, flag_of, read_yaml


@dataclasses.dataclass
class Request:
    """What the command line asked for: a configuration, and how to treat an existing run."""

    config: TrainConfig
    given: set[str]  # names of the fields that were on the command line
    resume: bool = False
    overwrite: bool = False
    digest: str = ""  # of the text that a new run must have; empty: of any
    layout: Layout = dataclasses.field(default_factory=Layout)


def with_file(values: dict, also: dict[str, Rule] | None = None) -> dict:
    """The settings of a command line over those of its --config, a YAML file that may hold `also`
    other fields."""
    place = values.pop("config", None)
    if place is None:
        return values
    prefix = "--config: "
    fields = read_yaml(Path(place), prefix)
    rules = RULES | (also or {})
    return check_fields(rules, fields, prefix + place, optional=set(rules)) | values


def parse_train(argv: list[str]) -> Request:
    parser = Parser("train", "Train a small Mixture-of-Experts language model on real text.")
    parser.add_settings(TrainConfig, Layout)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue the run --name, or the latest run without --name",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace the run --name if it exists"
    )
    values = vars(parser.parse_args(argv))
    resume, overwrite = values.pop("resume"), values.pop("overwrite")
    also = {"data_digest": DIGEST} | layout.RULES  # a run's config.json has a digest
    values = with_file(values, also)
    digest = values.pop("data_digest", "")
    spread = Layout(**{name: values.pop(name) for name in layout.RULES.keys() & values.keys()})
    if spread.asked and values.get("device", "auto") == "auto":
        values["device"] = "cuda" if spread.gpus else "cpu"
    config = TrainConfig(**values)
    if resume and not config.name:
        config.name = latest_run(config.runs_dir)
    if not config.name:
        config.name = time.strftime("train-%Y%m%d-%H%M%S")
    if not resume:
        validate(config)
    return Request(config, set(values), resume, overwrite, digest, spread)


def settled(request: Request) -> tuple[TrainConfig, str]:
    """The configuration of the run, of an existing one with what the request changes, and the
    digest of the text it must have. UserError where the layout does not fit."""
    config, digest = request.config, request.digest
    if request.resume:
        saved, digest = read_config(config.run_dir)
        config = merge_for_resume(saved, request)
    layout.validate(request.layout, config)
    return config, digest


def merge_for_resume(saved: TrainConfig, request: Request) -> TrainConfig:
    """The saved configuration with the changes that a resumed run allows."""
    merged = dataclasses.replace(saved, name=request.config.name, runs_dir=request.config.runs_dir)
    for field in sorted(request.given - {"name", "runs_dir"}):
        value, before = getattr(request.config, field), getattr(saved, field)
        if field in CHANGEABLE_ON_RESUME:
            setattr(merged, field, value)
        elif field == "dtype" and value == "auto":
            continue  # settled when the run began
        elif value != before:
            raise UserError(
                f"--resume: {flag_of(field)} is {value} but the checkpoint of run "
                f"{merged.name} was made with {before}"
            )
    validate(merged)
    return merged
