"""The example of docs/guide/python.md runs as printed."""

import re
from pathlib import Path


def test_the_example_runs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "python.md").read_text()
    tested = re.search(r"<!-- tested by [^>]*-->\n```python\n(.*?)```", page, re.DOTALL)
    scope = {}
    exec(tested.group(1), scope)  # noqa: S102  (the page is ours)
    assert scope["layer"].w1.grad.abs().max() > 0
    assert int(scope["rows_per_expert"].sum()) == 4 * 16 * 2
