"""What a wheel holds and needs, as CycloneDX JSON beside it: make sbom.

    scripts/sbom.py WHEEL...

Listed are the wheel with its SHA-256, what its metadata requires, and the third-party code that is
found inside: oneDNN, whose library tells its version, and the CUDA runtime, whose version is that
of `nvcc`. NOTICE has their licences.
"""

import ctypes
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

from cyclonedx.factory.license import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement


def sha256(content: bytes) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=hashlib.sha256(content).hexdigest())


def library(name: str, version: str | None, licence: str, purl: PackageURL, **more) -> Component:
    licences = [LicenseFactory().make_from_string(licence)]
    return Component(
        name=name, version=version, type=ComponentType.LIBRARY, licenses=licences, purl=purl,
        bom_ref=str(purl), **more,
    )  # fmt: skip


def onednn_version(content: bytes) -> str:
    """As the library itself says."""

    class Version(ctypes.Structure):
        _fields_ = [(part, ctypes.c_int) for part in ("major", "minor", "patch")]

    ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)  # in a wheel it finds torch's
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(content)
        file.flush()
        ask = ctypes.CDLL(file.name).dnnl_version
        ask.restype = ctypes.POINTER(Version)
        version = ask().contents
    return f"{version.major}.{version.minor}.{version.patch}"


def cuda_version() -> str:
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV(\d+\.\d+\.\d+)", told)[1]


def bundled(wheel: zipfile.ZipFile) -> list[Component]:
    """Third-party code inside the wheel."""
    found = []
    for name in filter(lambda name: ".so" in Path(name).name, wheel.namelist()):
        content = wheel.read(name)
        if "dnnl" in Path(name).name:
            version = onednn_version(content)
            purl = PackageURL("github", "oneapi-src", "oneDNN", f"v{version}")
            found.append(library("oneDNN", version, "Apache-2.0", purl, hashes=[sha256(content)]))
        if b".nv_fatbin" in content:
            version = cuda_version()
            purl = PackageURL("generic", "nvidia", "cuda-cudart", version)
            found.append(library("CUDA runtime (static)", version, "NVIDIA CUDA EULA", purl))
    return found


def required(metadata) -> list[Component]:
    """What pip installs with it; extras are not."""
    found = []
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if "extra" in str(requirement.marker or ""):
            continue
        purl = PackageURL("pypi", name=requirement.name)
        wanted = Property(name="sonicmoe:requires", value=str(requirement.specifier))
        found.append(
            Component(name=requirement.name, purl=purl, bom_ref=str(purl), properties=[wanted])
        )
    return found


def bill_of(path: Path) -> Bom:
    with zipfile.ZipFile(path) as wheel:
        (place,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = BytesParser().parsebytes(wheel.read(place))
        parts = bundled(wheel) + required(metadata)
    name, version = metadata["Name"], metadata["Version"]
    root = library(
        name, version, "Apache-2.0", PackageURL("pypi", name=name, version=version),
        hashes=[sha256(path.read_bytes())],
    )  # fmt: skip
    bom = Bom(components=parts)
    bom.metadata.component = root
    bom.register_dependency(root, parts)
    return bom


def main(wheels: list[str]) -> None:
    if not wheels:
        sys.exit("sbom: expected a wheel: `make wheel` builds it into dist/")
    for wheel in map(Path, wheels):
        output = wheel.with_suffix(".cdx.json")
        output.write_text(JsonV1Dot6(bill_of(wheel)).output_as_string(indent=2) + "\n")
        print(output)


if __name__ == "__main__":
    main(sys.argv[1:])
