"""What a release brings: the list of a wheel's parts, the licences, the workflow that publishes."""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("cyclonedx")
REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
METADATA = """\
Metadata-Version: 2.4
Name: sonicmoe-cpp
Version: 1.2.3
Requires-Dist: torch>=2.10
Requires-Dist: transformers>=5.7; extra == "transformers"
"""


def onednn():
    """A oneDNN of this machine: its library and the beginning of its version."""
    for path in sorted(Path("/usr/lib").glob("*/libdnnl.so.*.*")):
        return path.read_bytes(), path.name.removeprefix("libdnnl.so.")
    pytest.skip("oneDNN is not installed")


@pytest.fixture
def wheel(tmp_path):
    def wheel(**files):
        path = tmp_path / "sonicmoe_cpp-1.2.3-py3-none-manylinux_2_28_x86_64.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("sonicmoe_cpp-1.2.3.dist-info/METADATA", METADATA)
            for name, content in files.items():
                archive.writestr(f"sonicmoe_cpp/{name}.so", content)
        return path

    return wheel


def bill_of(wheel, tmp_path):
    """The list that the script writes beside the wheel, provided that it is valid."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'release 13.0, V13.0.88'\n")
    (tmp_path / "nvcc").chmod(0o755)
    script = [sys.executable, REPOSITORY / "scripts" / "sbom.py", wheel]
    subprocess.run(script, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    text = wheel.with_suffix(".cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    return json.loads(text)


def test_a_wheel_is_listed_with_all_its_parts(wheel, tmp_path):
    library, version = onednn()
    path = wheel(_C=b"\x7fELF .nv_fatbin", libsonicmoe_dnnl=library)
    bill = bill_of(path, tmp_path)
    root = bill["metadata"]["component"]
    assert (root["name"], root["version"]) == ("sonicmoe-cpp", "1.2.3")
    assert root["hashes"][0]["content"] == hashlib.sha256(path.read_bytes()).hexdigest()
    parts = {part["name"]: part for part in bill["components"]}
    assert parts.keys() == {"oneDNN", "CUDA runtime (static)", "torch"}
    assert re.fullmatch(rf"{re.escape(version)}(\.\d+)*", parts["oneDNN"]["version"])
    assert parts["oneDNN"]["hashes"][0]["content"] == hashlib.sha256(library).hexdigest()
    assert parts["CUDA runtime (static)"]["version"] == "13.0.88"
    assert parts["torch"]["properties"] == [{"name": "sonicmoe:requires", "value": ">=2.10"}]
    (needed,) = (one for one in bill["dependencies"] if one["ref"] == root["bom-ref"])
    assert sorted(needed["dependsOn"]) == sorted(part["bom-ref"] for part in parts.values())
    notice = (REPOSITORY / "NOTICE").read_text()
    assert "oneDNN" in notice and "NVIDIA CUDA runtime" in notice


def test_a_wheel_without_them_lists_neither(wheel, tmp_path):
    bill = bill_of(wheel(_C=b"\x7fELF"), tmp_path)
    assert [part["name"] for part in bill["components"]] == ["torch"]


def test_every_library_that_is_included_has_a_notice():
    """Headers in a folder that is not of the compilers, nor torch's."""
    notice = (REPOSITORY / "NOTICE").read_text()
    names = {"CLI": "CLI11", "nlohmann": "JSON for Modern C++", "oneapi": "oneDNN", "nvtx3": "NVTX"}
    sources = [
        path
        for folder in ("src", "cli", "rig", "bindings", "include", "oracle")
        for path in (REPOSITORY / folder).rglob("*.[chi]*")
        if path.suffix in {".cpp", ".hpp", ".cu", ".cuh"}
    ]
    text = "\n".join(path.read_text() for path in sources)
    used = set(re.findall(r"#include <(\w+)/", text)) - {"sys", "sanitizer", "torch"}
    assert used <= names.keys() and {"CLI", "nlohmann"} <= used
    assert all(names[one] in notice for one in used)


def commands(workflow):
    """What the jobs of a workflow run."""
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return "\n".join(step.get("run", "") for job in jobs for step in job["steps"])


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_parses_and_makes_what_there_is(workflow):
    parsed = yaml.safe_load(workflow.read_text())
    assert parsed["permissions"] == {"contents": "read"}
    assert all(
        step.keys() & {"run", "uses"} for job in parsed["jobs"].values() for step in job["steps"]
    )
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
    wanted = re.findall(r"\bmake (?!python3)([a-z-]+)$", commands(workflow), re.M)
    assert set(wanted) <= set(targets)


def test_a_release_is_published_from_a_tag_without_a_password():
    parsed = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "release.yml").read_text())
    assert parsed[True] == {"push": {"tags": ["v*"]}}  # `on` is true in YAML 1.1
    jobs = parsed["jobs"]
    assert jobs["pypi"]["permissions"] == {"id-token": "write"}
    assert jobs["pypi"]["needs"] == "build" and jobs["github"]["needs"] == ["build", "pypi"]
    made = commands(REPOSITORY / ".github" / "workflows" / "release.yml")
    assert all(f"make {target}" in made for target in ("wheel", "package", "sbom"))
    assert not re.search(r"(?i)secrets\.|password", json.dumps(jobs))
