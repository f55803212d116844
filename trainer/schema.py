"""What a setting or a field of a file may hold: declared once, checked in one place.

A Rule says in words what it expects and decides whether a value is that. The same rules check the
command line, config.json, the header of a token file, lines of metrics and a checkpoint's state.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import reprlib
from collections.abc import Callable
from pathlib import Path

from . import files

LARGEST = 2**31 - 1


class UserError(Exception):
    """A mistake in what the user asked for or handed in: reported as one line, exit code 2."""


@dataclasses.dataclass(frozen=True)
class Rule:
    expected: str  # in words: "a whole number from 1"
    accepts: Callable[[object], bool]
    parse: Callable[[str], object] = str  # of a flag; ValueError for what is no such thing

    def check(self, place: str, value: object) -> None:
        if not self.accepts(value):
            raise UserError(f"{place}: expected {self.expected}, got {reprlib.repr(value)}")

    def flag(self, text: str) -> object:
        """argparse's `type`."""
        try:
            value = self.parse(text)
        except ValueError:
            value = text
        if not self.accepts(value):
            message = f"expected {self.expected}, got {reprlib.repr(text)}"
            raise argparse.ArgumentTypeError(message)
        return value


def whole(low: int = 0, high: int = LARGEST) -> Rule:
    return Rule(
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
        int,
    )


def number(low: float = 0.0, high: float = math.inf, above: bool = False) -> Rule:
    """Finite, in [low, high]; `above` leaves `low` out."""
    words = f"a finite number {'above' if above else 'from'} {low:g}"
    words += "" if high == math.inf else f" to {high:g}"

    def accepts(value: object) -> bool:
        if type(value) not in (int, float) or not -1e308 <= value <= min(high, 1e308):
            return False
        return value > low if above else value >= low

    return Rule(words, accepts, float)


def text(expected: str = "UTF-8 text", most: int = 4096, pattern: str = "(?s:.*)") -> Rule:
    def accepts(value: object) -> bool:
        if not isinstance(value, str) or len(value) > most or "\0" in value:
            return False
        in_utf8 = value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
        return in_utf8 and re.fullmatch(pattern, value) is not None

    return Rule(f"{expected}, at most {most} characters", accepts)


def path() -> Rule:
    """Of a file to read: its name may be no UTF-8."""
    return Rule("a path", lambda value: isinstance(value, str) and "\0" not in value)


def one_of(*values: str) -> Rule:
    return Rule(f"one of {', '.join(values)}", lambda value: value in values)


def list_of(rule: Rule, least: int = 1) -> Rule:
    return Rule(
        f"a list, at least {least} long, each {rule.expected}",
        lambda value: type(value) is list and len(value) >= least and all(map(rule.accepts, value)),
    )


def switch() -> Rule:
    return Rule("true or false", lambda value: type(value) is bool)


def instance_of(kind: type | tuple[type, ...], expected: str) -> Rule:
    return Rule(expected, lambda value: isinstance(value, kind))


# ------------------------------------------------------------------------------------------ records


def check_fields(
    rules: dict[str, Rule], fields: object, place: str, optional: set[str] = frozenset()
) -> dict:
    """`fields`, an object that has exactly the fields of `rules`, but perhaps not the optional
    ones; UserError for the first that is missing, unknown or against its rule."""
    if type(fields) is not dict:
        raise UserError(f"{place}: expected an object with fields, got {reprlib.repr(fields)}")
    for name in sorted(rules.keys() - fields.keys() - optional):
        raise UserError(f"{place}: {name} is missing: expected {rules[name].expected}")
    for name, value in fields.items():
        if name not in rules:
            raise UserError(f"{place}: {reprlib.repr(name)} is no field of it")
        rules[name].check(f"{place}: {name}", value)
    return fields


def read_json(place: Path, prefix: str = "") -> object:
    """Of a regular file with one JSON value; UserError names it."""
    try:
        return files.parse_json(files.read_bytes(place))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{prefix}cannot read {place}: {files.reason(error)}") from error


def read_yaml(place: Path, prefix: str = "") -> object:
    """Of a regular file with one YAML document, of which JSON is a part; UserError names it."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a name that comes twice, and reads 1e-3 as the number that it is in YAML 1.2."""

        def construct_mapping(self, node, deep=False):
            fields = super().construct_mapping(node, deep)
            if len(fields) != len(node.value):
                raise ValueError("an object has the same name twice")
            return fields

    exponent = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    try:
        return yaml.load(files.read_bytes(place, most=1 << 20), Loader)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{prefix}cannot read {place}: {files.reason(error)}") from error


# -------------------------------------------------------------------------- dataclasses of settings


def setting(default: object, rule: Rule, help_text: str, group: str, metavar: str = ""):
    """A field of a dataclass of settings: its default, its rule, and its flag's help."""
    return dataclasses.field(
        default=default,
        metadata={"rule": rule, "help": help_text, "group": group, "metavar": metavar},
    )


def rules_of(cls: type) -> dict[str, Rule]:
    return {field.name: field.metadata["rule"] for field in dataclasses.fields(cls)}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """One that answers a wrong flag with one line instead of the usage."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> None:
        message = message.removeprefix("argument ")
        raise UserError(f"{message} (--help lists the flags)")

    def add(self, flag: str, rule: Rule, help_text: str, group=None, **options) -> None:
        """A flag whose value is checked against the rule."""
        default = options.get("default")
        note = f" (default: {default})" if default not in (None, "", [], argparse.SUPPRESS) else ""
        (group or self).add_argument(
            flag, type=rule.flag, help=(help_text + note).replace("%", "%%"), **options
        )

    def add_settings(self, *classes: type) -> None:
        """The flags of dataclasses of settings, and --config for a file of them. A flag not given
        is absent from the namespace."""
        self.add(
            "--config",
            path(),
            "a YAML file of settings, named as the flags with _ for -; flags on the command line "
            "come before it",
            default=argparse.SUPPRESS,
            metavar="FILE",
        )
        groups: dict[str, argparse._ArgumentGroup] = {}
        for field in (field for cls in classes for field in dataclasses.fields(cls)):
            meta, default = field.metadata, field.default
            group = meta["group"]
            if group not in groups:
                groups[group] = self.add_argument_group(group)
            if default is False:
                groups[group].add_argument(
                    flag_of(field.name), action="store_true", default=argparse.SUPPRESS,
                    help=meta["help"],
                )  # fmt: skip
                continue
            note = "" if default == "" else f" (default: {default})"
            self.add(
                flag_of(field.name),
                meta["rule"],
                meta["help"] + note,
                groups[group],
                default=argparse.SUPPRESS,
                metavar=meta["metavar"] or ("N" if isinstance(default, int) else "X"),
            )
