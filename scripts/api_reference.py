"""The C++ reference, made from include/: a page for each header, a section for each declaration.

    python scripts/api_reference.py    fails on a public declaration without a /// comment

As a hook of mkdocs.yml it lists folders in the navigation and adds the pages api/cpp/NAME.md. A
declaration is shown as it stands, comment and all: formulas, shapes and units are aligned there. On
all pages a link out of docs/ becomes its text, because the site has no such page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
HEADERS = sorted((REPOSITORY / "include" / "sonicmoe").glob("*.hpp"))
# What a declaration introduces: a type, an alias, a function, a constant.
NAMES = (  # in what precedes the first brace
    r"\b(?:struct|class|enum class)\s+(?:SONICMOE_API\s+)?(\w+)",
    r"\busing\s+(\w+)\s*=",
    r"(\w+|operator\S+)\s*\(",
    r"(\w+)(?:\[\])?\s*(?:=|;|$)",
)


@dataclass(frozen=True)
class Declaration:
    name: str
    line: int
    text: str  # with its comment

    @property
    def documented(self) -> bool:
        return self.text.startswith("///") or "///<" in self.text.split("\n")[0]


def code_of(line: str) -> str:
    return re.sub(r'"[^"]*"|//.*', "", line)


def blocks(source: str) -> Iterator[tuple[int, list[str]]]:
    """Runs of lines inside a namespace that a blank line outside of all braces ends; by line
    number."""
    depth, block, first, inside = 0, [], 0, False
    for number, line in enumerate(source.split("\n"), 1):
        if re.match(r"namespace\b|\}\s*// namespace", line):
            inside = line.startswith("namespace")
            continue
        if not inside or line.startswith("#"):
            continue
        if not block:
            first = number
        code = code_of(line)
        depth += sum(map(code.count, "{(")) - sum(map(code.count, "})"))
        if line or depth:
            block.append(line)
        elif block:
            yield first, block
            block = []
    if block:
        yield first, block


def declarations(header: Path) -> list[Declaration]:
    """What stands outside of all braces; lines of one run are one declaration and its overloads."""
    found = []
    for line, block in blocks(header.read_text()):
        code = "\n".join(map(code_of, block)).strip()
        if not code or re.fullmatch(r"(?:struct|class) \w+;", code):
            continue  # a comment, a forward declaration
        if code.startswith("static_assert"):
            continue
        head = re.sub(r"template\s*<[^>]*>", "", code).partition("{")[0]
        names = (re.search(pattern, head) for pattern in NAMES)
        name = next(match[1] for match in names if match)
        found.append(Declaration(name, line, "\n".join(block)))
    return found


def undocumented() -> list[str]:
    return [
        f"{header.relative_to(REPOSITORY)}:{declaration.line}: {declaration.name}: no /// comment"
        for header in HEADERS
        for declaration in declarations(header)
        if not declaration.documented
    ]


def head_comment(header: Path) -> str:
    """The comment above #pragma once, as prose."""
    head = header.read_text().partition("#pragma once")[0]
    return "\n".join(line.removeprefix("//").removeprefix(" ") for line in head.split("\n")).strip()


def page_of(header: Path) -> str:
    """In Markdown."""
    intro = head_comment(header)
    summary, _, rest = intro.partition("\n\n")
    parts = [f"# sonicmoe/{header.name}", summary or "Public header."]
    if rest:
        parts.append(f"```text\n{rest}\n```")
    for declaration in declarations(header):
        parts.append(f"## `{declaration.name}`\n\n```cpp\n{declaration.text}\n```")
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------- hooks of mkdocs


def on_config(config):
    """FOLDER/ in the navigation stands for its pages, README first."""

    def pages(folder: str) -> list[str]:
        docs = Path(config.docs_dir)
        found = sorted((docs / folder).glob("*.md"), key=lambda p: (p.name != "README.md", p.name))
        return [str(page.relative_to(docs)) for page in found]

    for entry in config.nav:
        if isinstance(entry, dict):
            for title, value in entry.items():
                if isinstance(value, str) and value.endswith("/"):
                    entry[title] = pages(value)
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    rows = []
    for header in HEADERS:
        if found := declarations(header):
            uri = f"api/cpp/{header.stem}.md"
            files.append(File.generated(config, uri, content=page_of(header)))
            names = ", ".join(dict.fromkeys(f"`{one.name}`" for one in found))
            rows.append(f"| [{header.name}](cpp/{header.stem}.md) | {names} |")
    index = files.get_file_from_path("api/cpp.md")
    table = "\n".join(["| header | declares |", "|---|---|", *rows])
    text = Path(index.abs_src_path).read_text().replace("<!-- headers -->", table)
    files.remove(index)
    files.append(File.generated(config, "api/cpp.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.abs_src_path is None:
        return markdown
    docs, folder = Path(config.docs_dir), Path(page.file.abs_src_path).parent

    def link(match: re.Match) -> str:
        target = (folder / match[2]).resolve()
        outside = not target.is_relative_to(docs) and ":" not in match[2]
        return match[1] if outside else match[0]

    return re.sub(r"\[([^\]]+)\]\(([^)#]+)(?:#[^)]*)?\)", link, markdown)


if __name__ == "__main__":
    missing = undocumented()
    print("\n".join(missing) or f"{len(HEADERS)} headers: every declaration is documented")
    sys.exit(bool(missing))
