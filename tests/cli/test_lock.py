"""The locks: a version and hashes of every Python package. requirements.txt is installed."""

import importlib.metadata
import re
from pathlib import Path

import pytest

requirements = pytest.importorskip("packaging.requirements")
REPOSITORY = Path(__file__).resolve().parents[2]
CUDA = ("nvidia-", "cuda-", "triton")


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def parsed(text):
    """(requirement, hashes) of each entry of a requirements file."""
    entries = text.replace("\\\n", " ").splitlines()
    for entry in filter(None, (re.sub(r"(^|\s)#.*", "", line).strip() for line in entries)):
        line, *hashes = re.split(r"\s+--hash=", entry)
        yield requirements.Requirement(line), hashes


def entries_of(name):
    return list(parsed((REPOSITORY / name).read_text()))


@pytest.fixture(scope="module")
def locked():
    return entries_of("requirements.txt")


@pytest.fixture(scope="module")
def locked_for_wheels():
    return entries_of("scripts/requirements-wheel.txt")


@pytest.fixture(scope="module")
def wanted():
    return [one for one, _ in entries_of("requirements.in")]


def test_every_package_has_one_version_and_hashes(locked, locked_for_wheels):
    assert len(locked) > 50 and len(locked_for_wheels) > 20
    for requirement, hashes in locked + locked_for_wheels:
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes)


def test_torch_and_its_cuda_libraries_are_left_to_the_machine(locked, wanted):
    assert "torch" in {one.name for one in wanted}
    names = {canonical(requirement.name) for requirement, _ in locked}
    assert not {name for name in names if name == "torch" or name.startswith(CUDA)}


def versions_of(locked):
    versions = {}
    for requirement, _ in locked:
        (version,) = (specifier.version for specifier in requirement.specifier)
        versions.setdefault(canonical(requirement.name), []).append(version)
    return versions


def test_a_wheel_is_made_with_what_was_asked_for_and_the_tests_versions(locked, locked_for_wheels):
    versions, others = versions_of(locked_for_wheels), versions_of(locked)
    for one, _ in entries_of("scripts/requirements-wheel.in"):
        assert all(one.specifier.contains(v) for v in versions[canonical(one.name)]), one
    shared = versions.keys() & others.keys()
    assert shared and all(set(versions[name]) <= set(others[name]) for name in shared)


def test_the_lock_holds_what_was_asked_for(locked, wanted):
    versions = versions_of(locked)
    for one in wanted:
        if one.name != "torch":
            assert one.name in versions, f"{one.name}: `make lock` was forgotten"
            assert all(one.specifier.contains(v) for v in versions[one.name]), one


def test_what_is_locked_needs_nothing_else(locked, wanted):
    """Of the packages installed here, all that they need is in the lock, or is torch's."""
    names = {canonical(requirement.name) for requirement, _ in locked} | {"torch"}
    for requirement, _ in locked:
        if requirement.marker and not requirement.marker.evaluate():
            continue
        for line in importlib.metadata.requires(requirement.name) or []:
            needed = requirements.Requirement(line)
            if not needed.marker or needed.marker.evaluate({"extra": ""}):
                assert canonical(needed.name) in names, f"{requirement.name} needs {needed}"


def test_the_tests_run_on_what_is_locked(locked):
    for requirement, _ in locked:
        if not requirement.marker or requirement.marker.evaluate():
            installed = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(installed), f"{requirement}: got {installed}"
