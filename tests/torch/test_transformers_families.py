"""scripts/transformers_families.py, on some families, and what its page says of all."""

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "scripts"))

transformers = pytest.importorskip("transformers", "5.23")

import torch
import transformers_families as families

PAGE = families.PAGE.read_text()
EQUAL, _, REST = PAGE.partition("**Refused")


@pytest.mark.parametrize("family", ["granitemoe", "nemotron_h", "qwen2_moe"])
def test_equal_families(family):
    seen = families.see(family)
    assert seen.equal and f"{family}," in " ".join(EQUAL.split())


@pytest.mark.parametrize("family", ["minimax_m3_vl"])
def test_refused_families(family):
    seen = families.see(family)
    assert seen.refusal is not None and not seen.equal
    assert f"| {family} | `{families.name_of(seen.refusal)}` |" in REST


def test_the_page_speaks_of_every_family():
    version = ".".join(transformers.__version__.split(".")[:2])
    if f"transformers {version}:" not in PAGE:
        pytest.skip(f"the page is not of transformers {version}")
    words = set(PAGE.replace(",", " ").replace(".", " ").replace("|", " ").split())
    assert set(families.families()) <= words
    assert f"interface, {len(families.families())} of them" in " ".join(PAGE.split())


def test_a_difference_is_noticed(monkeypatch):
    """Experts that compute something else, or that the interface never calls."""
    model = families.build("qwen2_moe")
    theirs = families.run(model, "eager")
    right = families.hf.experts_forward
    monkeypatch.setattr(families.hf, "experts_forward", lambda *given: 1.001 * right(*given))
    assert families.compared(families.run(model, "sonicmoe_cpp"), theirs) > families.TOLERANCE
    with pytest.raises(AssertionError, match="not called"):
        families.compared(theirs, theirs)


def test_the_table_of_what_was_seen():
    seen = [
        families.Seen("one", "model", error=1e-7),
        families.Seen("two", "model", error=0.5),
        families.Seen("three", "model", refusal="sonicmoe_cpp: Three.act_fn: expected a, got b"),
        families.Seen("four", "no model", note="a reason; another"),
    ]
    lines = families.table(seen)
    assert lines[:3] == ["**Equal: 1**, the largest difference 1.0e-07.", "", "one."]
    assert "| three | `act_fn: expected a, got b` |" in lines
    assert "| two | differs by 5.0e-01 |" in lines
    assert "| four | no small model of it could be built: a reason |" in lines
    page = families.with_table(f"a\n{families.BEGIN}\nold\n{families.END}\nb\n", lines)
    assert page.startswith("a\n") and page.endswith("\nb\n") and "old" not in page


def test_gradients_are_compared_each_by_its_own_size():
    zero, one = torch.zeros(2), torch.ones(2)
    assert families.difference(one, zero) == 1 and families.difference(zero, one) == 1
    assert families.difference(zero, zero) == 0
