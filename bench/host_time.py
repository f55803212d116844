"""Host time of one `moe_layer` call from eager Python, of two builds of the package.

At a tiny shape nearly all of a call is Python, the dispatcher and checks. Every build has a process
of its own; they take turns, A B B A, --rounds times. A turn is --repeats calls; on a GPU they are
timed until they return, and the GPU is waited for between turns. Printed are the least, p10, the
median and p90 of the turns, in microseconds a call. Other load only adds: on a busy machine the
least says most.

    python bench/host_time.py old=/tmp/old new=bindings/torch [--device cuda] [--output FILE]

NAME=FOLDER: a folder that holds sonicmoe_cpp/ with its _C.so; the first is what others are compared
with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 4, 16, 16, 4, 2
PARTS = ("forward", "forward_no_grad", "forward_backward")


def serve(device: str, repeats: int) -> None:
    """One turn for each line on stdin: the seconds of a call of each part."""
    import sonicmoe_cpp as sm
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = (
        (TOKENS, WIDTH), (EXPERTS, WIDTH), (EXPERTS, 2 * HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN),
    )  # fmt: skip
    leaves = [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]
    grad = torch.randn(shapes[0], device=device, dtype=dtype)

    def forward():
        return sm.moe_layer(*leaves, TOP_K)[0]

    def forward_no_grad():
        with torch.no_grad():
            return sm.moe_layer(*leaves, TOP_K)[0]

    def forward_backward():
        return torch.autograd.grad(forward(), leaves, grad)

    calls = {"forward": forward, "forward_no_grad": forward_no_grad}
    calls["forward_backward"] = forward_backward
    for _ in sys.stdin:
        seconds = {}
        for part in PARTS:
            call = calls[part]
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[part] = (time.perf_counter() - start) / repeats
            if device == "cuda":
                torch.cuda.synchronize()
        print(json.dumps(seconds), flush=True)


class Build:
    def __init__(self, name: str, folder: str, device: str, repeats: int) -> None:
        self.name = name
        self.turns: dict[str, list[float]] = {part: [] for part in PARTS}
        environment = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--serve", "--device", device]
        self._process = subprocess.Popen(
            [*command, "--repeats", str(repeats)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self, counts: bool) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seconds = json.loads(self._process.stdout.readline())
        for part in PARTS if counts else ():
            self.turns[part].append(1e6 * seconds[part])

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def spread(values: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(values, n=10)
    median = statistics.median(values)
    return {"least": min(values), "p10": tenths[0], "median": median, "p90": tenths[-1]}


def compare(builds: list[Build], rounds: int) -> list[dict]:
    for build in builds * 2:
        build.turn(counts=False)
    for _ in range(rounds):
        for build in (*builds, *reversed(builds)):
            build.turn(counts=True)
    rows = []
    for part in PARTS:
        first = spread(builds[0].turns[part])
        for build in builds:
            figures = spread(build.turns[part])
            ratios = {f"{name}_ratio": figures[name] / first[name] for name in ("least", "median")}
            rows.append({"part": part, "build": build.name, **figures, **ratios})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("builds", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--output", type=Path, help="also write the rows as JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.device, args.repeats)
        return
    if len(args.builds) < 2 or any("=" not in build for build in args.builds):
        parser.error("two builds at least, each NAME=FOLDER")
    builds = [Build(*each.split("=", 1), args.device, args.repeats) for each in args.builds]
    rows = compare(builds, args.rounds)
    for build in builds:
        build.close()
    columns = ("least", "p10", "median", "p90")
    print("microseconds a call", " " * 10, *(f"{name:>8}" for name in columns), "   ratio")
    for row in rows:
        figures = (f"{row[name]:8.1f}" for name in columns)
        ratios = f"{row['least_ratio']:6.3f} (least) {row['median_ratio']:.3f} (median)"
        print(f"{row['part']:18}{row['build']:12}", *figures, ratios)
    if args.output:
        args.output.write_text(json.dumps({"device": args.device, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
