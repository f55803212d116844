#!/usr/bin/env python3
"""Fails where a public declaration has no /// comment: every exported function, type and alias."""

import re
import sys
from pathlib import Path

HEADERS = sorted((Path(__file__).resolve().parents[1] / "include").rglob("*.hpp"))
DECLARATION = re.compile(
    r"(SONICMOE_API|struct|class|enum class|using|template|constexpr|inline) .*[^;]$|"
    r"(SONICMOE_API|using|constexpr|inline) .*;$"
)


def undocumented(text: str) -> list[tuple[int, str]]:
    """Lines that begin a declaration at namespace scope without a comment right above them."""
    found, lines = [], text.splitlines()
    for i, line in enumerate(lines):
        continues = i > 0 and re.match(r"(template|\s)", lines[i - 1])
        if DECLARATION.match(line) and not continues and not lines[i - 1].startswith("///"):
            found.append((i + 1, line))
    return found


def main() -> int:
    missing = [(header, *at) for header in HEADERS for at in undocumented(header.read_text())]
    for header, number, line in missing:
        print(f"{header}:{number}: no /// above: {line}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
