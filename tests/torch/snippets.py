"""The code blocks of the pages, by sybil: Python runs, commands are looked up.

The blocks of a page run in order in one namespace, `python` as it stands and `diff` as both files
it stands for. Beside what earlier blocks made they find `gpu` and `installed(package)`.

    <!-- invisible-code-block: python      runs, and is not shown
    model = torch.nn.Linear(4, 4)
    -->
    <!-- skip: next if(not gpu, reason="needs a GPU") -->          of the next block
    <!-- skip: next "part of a longer script" -->
"""

import ast
import importlib.util
import re
from pathlib import Path
from unittest import SkipTest

import torch
from shell_commands import problems_of
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator, pad
from sybil.parsers.markdown import CodeBlockParser, SkipParser

SHOWN = ("text", "cmake", "cpp", "json", "yaml", "toml", "bibtex", "mermaid")  # nothing to run
RUN = ("python", "diff", "sh")
FENCE = re.compile(r"^ *```(.*)\n(?:.*\n)*?^ *```$", re.MULTILINE)
BARE_SKIP = re.compile(r"<!--+ *skip: *\w+ *--+>")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def sides_of(patch: str) -> tuple[str, str]:
    """The old and the new file of a block whose lines begin with -, + or a blank."""
    lines = [line or " " for line in patch.splitlines()]
    return tuple(
        "\n".join(line[1:] for line in lines if line[0] in kept) + "\n" for kept in (" -", " +")
    )


def run_diff(example: Example) -> None:
    line = example.line + example.parsed.line_offset
    spaces = [dict(example.namespace), example.namespace]
    for source, space in zip(sides_of(example.parsed), spaces, strict=True):
        exec(compile(pad(source, line), example.path, "exec"), space)


def look_up(example: Example) -> str | None:
    """What is wrong with the commands of a block; None where nothing is."""
    return "\n".join(problems_of(example.parsed)) or None


PAGES = Sybil(
    [
        CodeBlockParser("python", PythonEvaluator()),
        CodeBlockParser("diff", run_diff),
        CodeBlockParser("sh", look_up),
        SkipParser(),
    ]
)


def unknown_languages(text: str) -> list[str]:
    """Of the blocks that are neither run nor known to be shown only."""
    return [language for language in FENCE.findall(text) if language not in (*RUN, *SHOWN)]


def skips_without_reason(text: str) -> list[str]:
    return BARE_SKIP.findall(text)


def run_page(page: Path) -> tuple[int, list[str]]:
    """Runs every block; how many ran, and why each other did not."""
    document = PAGES.parse(page)
    document.namespace.update(gpu=torch.cuda.is_available(), installed=installed)
    ran, reasons = 0, []
    for example in document.examples():
        try:
            example.evaluate()
            ran += isinstance(example.parsed, str)  # and no directive
        except SkipTest as skipped:
            reasons.append(str(skipped))
            if example.region.lexemes["arguments"] == "python":
                ast.parse(example.parsed, example.path)
    return ran, reasons
