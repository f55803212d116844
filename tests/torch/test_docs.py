"""The pages keep their word: examples run, links lead somewhere, tables are the records'."""

import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / name) for name in ("", "examples", "scripts")]

import api_reference
import sonicmoe_cpp
import train_small

from bench.lib import tables as record_tables

DOCS = REPOSITORY / "docs"
PAGES = (
    sorted(REPOSITORY.glob("*.md"))
    + sorted(DOCS.rglob("*.md"))
    + sorted(REPOSITORY.glob("*/README.md"))
)
SOURCES = (
    *(
        "bench",
        "bindings",
        "cli",
        "cmake",
        "examples",
        "include",
        "lab",
        "oracle",
        "rig",
        "scripts",
    ),
    *("src", "tests", "trainer"),
)
SUFFIXES = {".py", ".cpp", ".hpp", ".cu", ".cuh", ".sh", ".toml", ".txt", ".md"}


def name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, hyphens for blanks."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_noticed():
    page = DOCS / "README.md"
    text = "[a](nowhere.md) [b](performance.md#method) [c](performance.md#nothing) [d](#nothing)"
    assert broken_links(page, text) == ["nowhere.md", "performance.md#nothing", "#nothing"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_wrapped(page):
    lines = enumerate(page.read_text().split("\n"), 1)
    assert [i for i, line in lines if len(line) > 100 and not line.startswith(("|", "!["))] == []


def test_every_page_that_the_sources_name_exists():
    missing = [
        f"{name(file)}: {page}"
        for folder in SOURCES
        for file in sorted((REPOSITORY / folder).rglob("*"))
        if file.suffix in SUFFIXES
        for page in re.findall(r"\bdocs/[\w/]+\.md\b", file.read_text())
        if not (REPOSITORY / page).exists()
    ]
    assert missing == []


def test_every_page_can_be_reached_from_the_readme():
    reached, todo = set(), [REPOSITORY / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in re.findall(r"\]\(([^)#]+\.md)[^)]*\)", without_code(page.read_text())):
            if not link.startswith("http"):
                todo.append((page.parent / link).resolve())
    assert [name(page) for page in sorted(DOCS.rglob("*.md")) if page not in reached] == []


HEADER = """// A header.
#pragma once

namespace sonicmoe {

/// Documented.
SONICMOE_API int sum(int a,
                     int b = 0);
SONICMOE_API int sum(float a);

class Declared;

struct Bare {
  int a;  ///< a field

  int b;
};

/// A list.
inline constexpr int kList[] = {
    1,
};

}  // namespace sonicmoe
"""


def test_every_public_declaration_is_documented():
    assert api_reference.undocumented() == []


def test_what_a_header_declares(tmp_path):
    header = tmp_path / "header.hpp"
    header.write_text(HEADER)
    found = {one.name: one for one in api_reference.declarations(header)}
    assert {name: one.documented for name, one in found.items()} == {
        "sum": True,
        "Bare": False,
        "kList": True,
    }
    assert HEADER.splitlines()[found["Bare"].line - 1] == "struct Bare {"
    page = api_reference.page_of(header)
    assert page.startswith("# sonicmoe/header.hpp\n\nA header.\n")
    assert "int b;\n};\n```" in page


def test_the_package_has_the_version_of_the_headers():
    header = (REPOSITORY / "include/sonicmoe/version.hpp").read_text()
    assert ".".join(re.findall(r"SONICMOE_VERSION_\w+ (\d+)", header)) == sonicmoe_cpp.__version__


def shown(page: Path) -> str:
    """Without comments and without where links lead."""
    text = re.sub(r"<!--.*?-->\n?", "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text)


def test_the_front_pages_stay_short():
    readme = shown(REPOSITORY / "README.md")
    assert len(readme.splitlines()) <= 70
    numbers = re.findall(r"\d+(?:\.\d+)*", readme)
    assert 20 < len(numbers) <= 60, numbers
    assert len((DOCS / "performance.md").read_text().splitlines()) <= 120


def test_tables_are_those_of_the_records():
    """`python -m bench.plots --markdown` writes them."""
    tables, shown = record_tables.tables(), set()
    for page in record_tables.PAGES:
        text = page.read_text()
        shown |= {marked[1] for marked in record_tables.MARKED.findall(text)}
        assert record_tables.with_tables(text, tables) == text, name(page)
    assert shown == set(tables)


def test_another_record_gives_another_page():
    tables = record_tables.tables()
    tables["h200"] = [line.replace("390/420", "391/420") for line in tables["h200"]]
    page = (DOCS / "performance.md").read_text()
    assert "391/420" in record_tables.with_tables(page, tables)


def test_the_small_example_learns():
    losses = train_small.train(steps=8, size=4)
    assert len(losses) == 8
    assert losses[0] > 5 > losses[-1]
