#!/usr/bin/env python3
"""check_layers.py: fails where a file includes what its layer must not know.

LAYERS lists every layer from the ground up with those that it may include; a layer may name only
layers above itself in the list, so there is no circle. A file belongs to the longest prefix that
its path begins with.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

LAYERS = {
    # What all stand on.
    "include": "",
    "oracle": "include",
    "src/math": "include",
    "src/core": "include src/math",
    # The host's backends.
    "src/layer": "include src/core",
    "src/router": "include src/math src/core src/layer",
    "src/cpu": "include src/math src/core src/layer src/router",
    "src/reference": "include oracle src/core src/layer src/router",
    # CUDA: the contract of the products, one family of kernels behind it, what is made of products.
    "src/cuda/ptx": "",
    "src/cuda": "include src/math src/core src/cuda/ptx",
    "src/cuda/hopper/choice.hpp": "",
    "src/cuda/hopper/tile": "src/cuda/ptx",
    "src/cuda/hopper/shape.hpp": "src/math src/cuda src/cuda/ptx",
    "src/cuda/hopper/mainloop": "src/math src/cuda/ptx src/cuda/hopper/tile "
    "src/cuda/hopper/shape.hpp",
    "src/cuda/hopper/epilogue": "include src/math src/cuda src/cuda/ptx src/cuda/hopper/tile "
    "src/cuda/hopper/shape.hpp",
    "src/cuda/hopper": "include src/core src/cuda src/cuda/ptx src/cuda/hopper/choice.hpp "
    "src/cuda/hopper/tile src/cuda/hopper/shape.hpp src/cuda/hopper/mainloop "
    "src/cuda/hopper/epilogue",
    "src/cuda/device.cpp": "include src/core src/cuda src/cuda/hopper",  # the list of families
    "src/cuda/experts": "include src/math src/core src/cuda src/cuda/ptx",
    "src/cuda/router": "include src/math src/core src/cuda src/cuda/ptx",
    "src/cuda/exchange": "include src/math src/core src/cuda src/cuda/ptx",
    "src/cuda/layer": "include src/core src/layer src/cuda src/cuda/experts src/cuda/router",
    "src/cuda/cuda_backend.cpp": "include src/core src/layer src/cuda src/cuda/exchange "
    "src/cuda/experts src/cuda/router src/cuda/layer",
    # The public operations.
    "src/api": "include src/math src/core src/layer",
    # Clients of the public headers.
    "bindings": "include",
    "examples": "include",
    # Whoever tests and measures may look inside.
    "rig": "include oracle src",
    "cli": "include oracle rig",
    "lab": "include src rig",
    "tests": "include oracle src rig cli lab",
}

# Headers of other projects, and who may include them.
FOREIGN = {
    r"(torch|ATen|c10)/": ("bindings",),
    r"(cuda|cublas|nvml)": ("src/cuda", "bindings", "cli", "rig", "lab", "tests"),
    r"(oneapi/)?dnnl": ("src/cpu",),
}

INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.MULTILINE)
SOURCES = (".cpp", ".hpp", ".cu", ".cuh")
# Where the path of an include begins; the includer's own folder comes first.
BASES = ("", "src", "include", "tests", "lab", "bindings/torch", "tests/epilogue/host")


def layer_of(path, layers=LAYERS):
    """The longest prefix of `path`, or None."""
    fits = [p for p in layers if path == p or path.startswith(p + "/")]
    return max(fits, key=len, default=None)


def may_include(layer, other, layers=LAYERS):
    """Layers under a named folder ("src" for tests) count as named where it is no layer itself."""
    allowed = layers[layer].split()
    return other == layer or any(
        other == a or (a not in layers and other.startswith(a + "/")) for a in allowed
    )


def circles(layers=LAYERS):
    """Layers that name one which stands below them in the list."""
    seen, found = [], []
    for layer, allowed in layers.items():
        for other in allowed.split():
            known = other in seen or any(s.startswith(other + "/") for s in seen)
            if not known or other == layer:
                found.append(f"LAYERS: {layer} may include {other}, which does not stand above it")
        seen.append(layer)
    return found


def target_of(path, name, files):
    """The file of this repository that `path` includes as `name`, or None."""
    for base in (pathlib.PurePosixPath(path).parent.as_posix(), *BASES):
        parts = []
        for part in (base + "/" + name).split("/"):
            if part == "..":
                parts = parts[:-1]
            elif part not in ("", "."):
                parts.append(part)
        if "/".join(parts) in files:
            return "/".join(parts)
    return None


def problems(contents):
    """One line for each forbidden include of {path: text}."""
    found = circles()
    for path, text in sorted(contents.items()):
        layer = layer_of(path)
        if layer is None:
            found.append(f"{path}: belongs to no layer of scripts/check_layers.py")
            continue
        for name in INCLUDE.findall(text):
            target = target_of(path, name, contents)
            if target is not None:
                if not may_include(layer, layer_of(target)):
                    found.append(f"{path}: {layer} must not include {target}")
                continue
            for pattern, allowed in FOREIGN.items():
                if re.match(pattern, name) and not path.startswith(allowed):
                    found.append(f"{path}: only {', '.join(allowed)} may include <{name}>")
    return found


def main():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    paths = [p for p in listed if p.endswith(SOURCES) and (ROOT / p).exists()]
    found = problems({p: (ROOT / p).read_text() for p in paths})
    print("\n".join(found) if found else f"{len(paths)} files keep to their layers")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
