"""Every code block of the pages runs, or says why it cannot; every command shown exists."""

from pathlib import Path

import pytest
import shell_commands
import snippets
from accelerate.state import AcceleratorState

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
GUIDES = [page for page in PAGES if page.parent in (REPOSITORY, REPOSITORY / "docs" / "guide")]


def name(page):
    return str(page.relative_to(REPOSITORY))


def with_code(page):
    return any(f"```{language}\n" in page.read_text() for language in snippets.RUN)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Where the blocks may write. accelerate keeps what a process chose first: forget it."""
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    return tmp_path


def run(text, folder):
    page = folder / "page.md"
    page.write_text(text)
    return snippets.run_page(page)


@pytest.mark.parametrize("page", [*filter(with_code, PAGES)], ids=name)
def test_the_blocks_run(page, empty_folder):
    ran, reasons = snippets.run_page(page)
    assert ran + len(reasons) > 0


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_block_that_does_not_run_says_why(page):
    assert snippets.skips_without_reason(page.read_text()) == []


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_a_block_names_its_language(page):
    assert snippets.unknown_languages(page.read_text()) == []


def test_the_pages_that_newcomers_read_have_examples():
    newcomers = ("README.md", "docs/guide/getting_started.md", "docs/guide/python.md")
    assert all("```python\n" in (REPOSITORY / page).read_text() for page in newcomers)


PYTHON = "```python\nassert x == 3\n```\n"
HIDDEN = "<!-- invisible-code-block: python\nx = {}\n-->\n"


def test_blocks_share_what_earlier_ones_made(empty_folder):
    assert run(HIDDEN.format(3) + PYTHON, empty_folder) == (2, [])
    with pytest.raises(AssertionError):
        run(HIDDEN.format(4) + PYTHON, empty_folder)


def test_a_skipped_block_is_counted_with_its_reason(empty_folder):
    skip = '<!-- skip: next if({}, reason="needs a reason") -->\n'
    assert run(skip.format(True) + PYTHON, empty_folder) == (0, ["needs a reason"])
    with pytest.raises(NameError):
        run(skip.format("not installed('torch')") + PYTHON, empty_folder)
    with pytest.raises(SyntaxError):
        run(skip.format(True) + "```python\nx = = 3\n```\n", empty_folder)
    assert snippets.skips_without_reason("<!-- skip: next -->\n") == ["<!-- skip: next -->"]


def test_both_sides_of_a_diff_run(empty_folder):
    diff = "```diff\n x = 1\n-x = x + {}\n+x = x + {}\n assert x > 1\n```\n"
    assert run(diff.format(1, 2) + PYTHON, empty_folder) == (2, [])
    for sides in ((0, 2), (2, 0)):
        with pytest.raises(AssertionError):
            run(diff.format(*sides), empty_folder)


def test_a_block_without_a_language_is_noticed():
    text = "```\nx\n```\n\n```python\nx\n```\n\n```nopython\nx\n```\n"
    assert snippets.unknown_languages(text) == ["", "nopython"]


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "make train NOTHING=1",
        'make train ARGS="--steps 3 --nothing 4"',
        "pip install ./nothing",
        "python nothing.py",
        "python examples/train_small.py --nothing",
        "python -m trainer.nothing",
        "python -m trainer.prepare --nothing",
        "torchrun --nproc-per-node 2 nothing.py",
        "cmake -S . -DSONICMOE_NOTHING=ON",
        "cmake --preset nothing",
        "nothing --at-all",
        "cd somewhere && VARIABLE=1 make \\\n    nothing",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(command):
    assert len(shell_commands.problems_of(command)) == 1


def test_commands_that_exist():
    text = """
        # a comment
        make train ARGS="--steps 3" && make docs JOBS=2
        pip install scikit-build-core ./bindings/torch
        OMP_NUM_THREADS=1 .venv/bin/python examples/train_small.py --steps=3  # a comment
        cmake --preset asan -DSONICMOE_CUDA=OFF
    """
    assert shell_commands.problems_of(text) == []
