"""Builds of this package against each other on one GPU, under a load that lasts.

At the card's power limit a short series says little: the clock follows the last second's load. Here
every build runs the layer's forward and backward for --settle seconds, then for --seconds: once
timed as a whole, with clock and power (nvidia-smi), once under the profiler. The builds take turns,
A B C C B A, each in a process of its own. The mean of the rounds and its ratio to the first
build's: microseconds per call of each kernel, of the call, clock, power and joules per call.

    python bench/compare_builds.py old=/tmp/old new=bindings/torch --problem 7B-n256 --rounds 4

NAME=FOLDER: a folder that holds sonicmoe_cpp/ with its _C.so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file, from anywhere
    sys.path[0] = str(Path(__file__).resolve().parents[1])

Reading = tuple[float, float, float]  # seconds (monotonic), watts, MHz
SUITES = ["paper", "models", "coarse", "small-batch"]
LEAST_SHARE = 0.01  # of the call, of a kernel that has a line of its own


def short_name(kernel: str) -> str:
    """The Spec of a grouped GEMM with its first arguments, else the function."""
    if spec := re.search(r"(\w+)Spec<([^>]*)", kernel):
        arguments = re.findall(r"(?:\)|^|, )\(?(-?\d+|true|false)\b", spec[2])
        return f"{spec[1]}<{', '.join(arguments)}>"
    function = re.sub(r"\(anonymous namespace\)::|<.*|^void |\((?!anonymous).*", "", kernel)
    return function.split("::")[-1].strip()


# ---------------------------------------------------------------------------------------- one build


class PowerLog:
    """nvidia-smi beside a measurement."""

    def __init__(self, gpu: str) -> None:
        query = ["--query-gpu=power.draw.instant,clocks.sm", "--format=csv,noheader,nounits"]
        self.readings: list[Reading] = []
        self.process = subprocess.Popen(
            ["nvidia-smi", "-i", gpu, *query, "-lms", "50"], stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if reading := parse_reading(line):
                self.readings.append((time.monotonic(), *reading))

    def stop(self) -> list[Reading]:
        self.process.terminate()
        self.process.wait()
        return self.readings


def parse_reading(line: str) -> tuple[float, float] | None:
    try:
        watts, mhz = (float(part) for part in line.split(","))
    except ValueError:  # not every card tells
        return None
    return watts, mhz


def mean_between(readings: list[Reading], begin: float, end: float) -> dict[str, float]:
    inside = [reading for reading in readings if begin <= reading[0] <= end]
    if not inside:
        return {}
    _, watts, mhz = (statistics.mean(column) for column in zip(*inside, strict=True))
    return {"watts": watts, "mhz": mhz}


def lasting_load(call: Callable[[], object], settle: float, seconds: float) -> tuple:
    """Milliseconds of a call, and from when to when (monotonic) they were measured. Calls are
    issued without a pause, some milliseconds of them ahead of the GPU."""
    import torch

    from bench.lib.timing import warm_seconds

    batch = max(1, round(0.01 / warm_seconds(call, 0.05)))
    marks: list[torch.cuda.Event] = []
    start = time.monotonic()
    begin = first = None
    while begin is None or time.monotonic() < begin + seconds:
        for _ in range(batch):
            call()
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        if len(marks) > 1:
            marks[-2].synchronize()
        if begin is None and time.monotonic() - start >= settle:
            begin, first = time.monotonic(), len(marks) - 1
    end = time.monotonic()
    torch.cuda.synchronize()
    calls = batch * (len(marks) - 1 - first)
    return marks[first].elapsed_time(marks[-1]) / calls, begin, end


def measure(arguments: argparse.Namespace) -> int:
    """Of the package on the path: prints one JSON object per problem."""
    import torch

    from bench.layer import EagerLayer
    from bench.lib.problem import Problem, suite_entries
    from bench.lib.profile import busy_by_name, busy_us, profiled_halves
    from bench.lib.timing import Pace, require_gpu
    from bench.systems import systems_named

    require_gpu()
    (system,) = systems_named([arguments.system])
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}".replace("GPU-GPU-", "GPU-")
    pace = Pace(arguments.seconds, arguments.settle, 0.0)
    for entry in suite_entries(SUITES, arguments.problem):
        layer = EagerLayer(Problem(entry["name"], tuple(entry["shape"])), system)

        def call(layer: EagerLayer = layer) -> object:
            return layer.backward(layer.forward())

        busy_us(call, repeats=1)  # what the first call and the first profile set up
        log = PowerLog(gpu)
        call_ms, begin, end = lasting_load(call, pace.settle, pace.seconds)
        row = {"problem": entry["name"], "ms": call_ms} | mean_between(log.stop(), begin, end)
        calls = profiled_halves(layer.forward, layer.backward, call_ms, pace)
        kernels: dict[str, float] = {}
        for one in calls:
            for name, us in busy_by_name(one.forward + one.backward).items():
                short = short_name(name)
                kernels[short] = kernels.get(short, 0.0) + us / len(calls)
        print("ROW " + json.dumps(row | {"kernels": kernels}))
        del layer
        torch.cuda.empty_cache()
    return 0


# ----------------------------------------------------------------------------------- the comparison


def known_problems() -> list[str]:
    from bench.lib.problem import suite_entries

    return [entry["name"] for entry in suite_entries(SUITES)]


def turns(names: list[str], rounds: int) -> list[str]:
    """A B C, C B A, A B C, ...: a drift meets all alike."""
    return [name for index in range(rounds) for name in (names if index % 2 == 0 else names[::-1])]


def run_build(folder: Path, arguments: list[str]) -> list[dict]:
    here = Path(__file__).resolve()
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(here), *arguments, "--worker"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]


def table(problem: str, rows: dict[str, list[dict]]) -> list[str]:
    """rows: by build, those of the rounds."""
    names = list(rows)
    means: dict[str, dict[str, float]] = {}  # by kernel and build
    for name, rounds in rows.items():
        for kernel in {kernel for row in rounds for kernel in row["kernels"]}:
            mean = statistics.mean(row["kernels"].get(kernel, 0.0) for row in rounds)
            means.setdefault(kernel, {})[name] = mean
    calls = {name: [1e3 * row["ms"] for row in rounds] for name, rounds in rows.items()}
    call = {name: statistics.mean(us) for name, us in calls.items()}
    lines = [f"{problem:44}" + "".join(f"{name:>20}" for name in names)]

    def line(label: str, values: dict[str, float], digits: int = 1) -> None:
        base = values.get(names[0])
        cells = (
            f"{'-':>19} " if name not in values
            else f"{values[name]:12.{digits}f} {values[name] / base:6.3f} " if base
            else f"{values[name]:12.{digits}f} {'':6} "
            for name in names
        )  # fmt: skip
        lines.append(f"  {label:42}" + "".join(cells))

    for kernel, values in sorted(means.items(), key=lambda item: -max(item[1].values())):
        if max(values.values()) >= LEAST_SHARE * call[names[0]]:
            line(kernel, values)
    line("call, us", call)
    spreads = (f"{min(us):.0f}-{max(us):.0f}" for us in calls.values())
    lines.append(f"  {'  of the rounds':42}" + "".join(f"{spread:>20}" for spread in spreads))
    for key, label in (("mhz", "clock, MHz"), ("watts", "power, W")):
        values = {
            name: statistics.mean(row[key] for row in rounds)
            for name, rounds in rows.items()
            if all(key in row for row in rounds)
        }
        line(label, values)
        if key == "watts":
            line("J per call", {name: w * call[name] / 1e6 for name, w in values.items()}, 3)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("builds", nargs="+", metavar="NAME=FOLDER")
    add("--problem", action="append", help="of bench/problems.json; default: 7B-n256")
    add("--system", default="sonicmoe", help="of bench/layer.py")
    add("--rounds", type=int, default=2)
    add("--settle", type=float, default=1.5, help="seconds of load before what is timed")
    add("--seconds", type=float, default=0.5, help="measured; of the profile at most twenty calls")
    add("--deadline", type=float, default=float("inf"),
        help="seconds; no turn begins that would end later by the longest so far")  # fmt: skip
    add("--output", type=Path, help="write the rows here (JSON)")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.problem = arguments.problem or ["7B-n256"]
    if arguments.worker:
        return measure(arguments)
    if unknown := set(arguments.problem) - set(known_problems()):
        parser.error(
            f"--problem {', '.join(sorted(unknown))}: not in the suites {', '.join(SUITES)}"
        )
    builds = {}
    for build in arguments.builds:
        name, _, folder = build.partition("=")
        if not (Path(folder) / "sonicmoe_cpp").is_dir():
            parser.error(f"{build}: no sonicmoe_cpp/ in {folder!r}")
        builds[name] = Path(folder).resolve()
    rows: dict[str, dict[str, list[dict]]] = {}
    start, longest = time.monotonic(), 0.0
    order = turns(list(builds), arguments.rounds)
    for turn, name in enumerate(order):
        began = time.monotonic()
        if began - start + longest > arguments.deadline:
            print(f"{turn} of {len(order)} turns, {began - start:.0f} s", flush=True)
            break
        for row in run_build(builds[name], sys.argv[1:]):
            rows.setdefault(row["problem"], {}).setdefault(name, []).append(row)
        longest = max(longest, time.monotonic() - began)
    for problem, by_build in rows.items():
        print("\n".join(table(problem, by_build)), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
