"""A real model in training on one GPU, beside torch's grouped_mm and transformers' loop.

The model is Qwen3-MoE of transformers with random weights of one seed, the same for every system;
parameters and gradients bfloat16, masters and AdamW's moments float32, attention through SDPA, the
logits for 4096 tokens at a time. One step is one microbatch and the optimizer. Every pair of system
and mode runs in a process of its own. Kinds of rows:

    losses  cross-entropy of the first steps, from the initial weights, at the common microbatch
    timing  at the common and at the largest microbatch (sequences), medians over the timed steps:
            step_ms, optimizer_ms, tokens_per_s = tokens / step_ms, peak_mib (most allocated),
            mfu = tokens_per_s * FLOPs per token / 989e12 (H100, dense bfloat16), where
            FLOPs per token = 6 * active parameters (in products: K of E experts, no embedding)
            + 6 * layers * sequence * hidden size (causal attention, forward and backward)
            mode plain: moe_ms, moe_share (marks on the stream around each MoE layer's forward
            and backward) and predicted_mib (trainer/footprint.py)
            on a GPU: busy_ms and kernels, milliseconds per step by kind of kernel (CUPTI)
    search  largest microbatch that runs two steps, and what the formula predicts
    failed  the reason; for out of memory the sizes of the tensors

With --gpus N the processes run side by side, each on a GPU of its own: `gpu` in the rows says
which, and product_tflops of the row `model` what that GPU reaches in a plain product of 8192^3,
bfloat16.

    python -m bench.train --output bench/results/train-h200.json
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Segments that grow leave no holes between microbatches of different sizes.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from bench.lib.record import new_record, rounded, write_record
from bench.lib.train_worker import SYSTEMS, failure, work
from trainer.gpus import gpu_names

DEFAULT_RUNS = (
    "sonicmoe:plain sonicmoe-rounding:plain grouped_mm:plain grouped_mm:compile sonicmoe:compile "
    "sonicmoe-rounding:compile grouped_mm_select:compile eager:plain sonicmoe:graph "
    "sonicmoe:compile+graph grouped_mm:compile+graph"
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--run", nargs="+", metavar="SYSTEM:MODE", default=DEFAULT_RUNS.split(),
        help=f"systems {', '.join(SYSTEMS)}; modes plain, compile, compile-model, graph, "
        "compile+graph")  # fmt: skip
    add("--hidden-size", type=int, default=1536)
    add("--intermediate-size", type=int, default=256)
    add("--num-experts", type=int, default=128)
    add("--top-k", type=int, default=8)
    add("--heads", type=int, default=12)
    add("--layers", type=int, default=0, help="0: as many as fit, within --most-parameters")
    add("--most-parameters", type=float, default=2e9)
    add("--memory-gib", type=float, default=78.0, help="what the number of layers must fit")
    add(
        "--cap-gib",
        type=float,
        default=0,
        help="let torch hold no more, as on a smaller GPU; 0: all",
    )
    add("--seq-len", type=int, default=4096)
    add("--vocab-size", type=int, default=16384, help="of synthetic tokens")
    add("--data", default="", help="a .bin of trainer.prepare; else synthetic tokens")
    add("--tile", type=int, default=128, help="of token rounding")
    add("--policy", default="nearest", help="of token rounding")
    add("--microbatch", type=int, default=4, help="the common one, in sequences")
    add("--most", type=int, default=64, help="the search ends here; 0: no search")
    add("--loss-steps", type=int, default=0)
    add("--warmup", type=int, default=3, help="steps before the timed ones")
    add("--steps", type=int, default=10, help="timed steps")
    add("--lr", type=float, default=3e-4, help="after 50 steps of warm-up")
    add("--seed", type=int, default=0)
    add("--limit", type=float, default=150, help="seconds for one system and mode")
    add("--deadline", type=float, default=570, help="seconds for all")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--gpus", type=int, default=1, help="processes at a time, each on its own GPU; 0: on all")
    add("--no-kernels", action="store_true", help="do not profile the kernels")
    add("--output", type=Path)
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.cap_gib < 0:
        parser.error("--cap-gib starts at 0")
    for run in arguments.run:
        if run.partition(":")[0] not in SYSTEMS:
            parser.error(f"--run {run}: expected one of {', '.join(SYSTEMS)} before the colon")
    return arguments


# --------------------------------------------------------------------------------------- the parent


class Runs:
    """The processes, the record of their rows, and the time that is left."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.record = arguments, header(arguments)
        self.begin, self.lock = time.monotonic(), threading.Lock()
        self.processes: list[subprocess.Popen] = []
        self.gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in gpu_names(arguments.gpus):
            self.gpus.put(name)

    def run_all(self) -> None:
        pool = ThreadPoolExecutor(self.gpus.qsize())
        try:
            for done in [pool.submit(self.run, run) for run in self.arguments.run]:
                done.result()
        except BaseException:  # Ctrl-C: nothing more begins, what runs ends
            pool.shutdown(wait=False, cancel_futures=True)
            for process in self.processes:
                process.terminate()
            raise
        finally:
            pool.shutdown()

    def run(self, run: str) -> None:
        gpu = self.gpus.get()
        try:
            left = self.arguments.deadline - (time.monotonic() - self.begin)
            if left < 20:
                self.add(failure(*run.split(":"), "not begun: no time left"))
            else:
                self.run_worker(run, min(self.arguments.limit, left - 10), gpu)
        finally:
            self.gpus.put(gpu)

    def run_worker(self, run: str, seconds: float, gpu: str) -> None:
        """One system and mode in a process of its own; its rows are in the record as they come."""
        system, _, mode = run.partition(":")
        command = [
            sys.executable,
            "-m",
            "bench.train",
            *sys.argv[1:],
            "--worker",
            "--limit",
            f"{seconds:.0f}",
        ]
        command += ["--run", run]
        log, told = [], False
        process = subprocess.Popen(
            ["timeout", "-k", "5", f"{seconds + 30:.0f}", *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
        )  # fmt: skip
        self.processes.append(process)
        for line in process.stdout:
            if line.startswith("ROW "):
                row = json.loads(line[4:])
                told = told or row["kind"] == "failed"
                self.add(row, gpu)
            else:
                log.append(line.rstrip())
        code = process.wait()
        if code and not told:
            reason = f"stopped after {seconds + 30:.0f} s" if code == 124 else f"exit code {code}"
            tail = " | ".join(line for line in log[-12:] if line.strip())
            self.add(failure(system, mode, f"{reason}: {tail}"[-1500:]), gpu)

    def add(self, row: dict, gpu: str = "") -> None:
        if gpu and self.arguments.gpus > 1:
            row = row | {"gpu": gpu}
        with self.lock:
            self.record["rows"].append(rounded(row))
            write_record(self.record, self.arguments.output)
            print(describe(row), flush=True)


def describe(row: dict) -> str:
    text = f"{row['system']:18}{row['mode']:14}{row['kind']:7}"
    if row["kind"] == "timing":
        text += f"{row['microbatch']:3} x  {row['step_ms']:8.1f} ms  {row['tokens_per_s']:9.0f}/s"
        text += f"  MFU {row['mfu']:.1%}"
        if "peak_mib" in row:
            text += f"  peak {row['peak_mib'] / 1024:.1f} GiB"
        if "moe_share" in row:
            text += f"  MoE {row['moe_share']:.0%}"
        if "busy_ms" in row:
            text += f"  busy {row['busy_ms']:.1f} ms"
    elif row["kind"] == "search":
        text += f"largest {row['largest']}, predicted {row['predicted']}"
    elif row["kind"] == "losses":
        text += f"{len(row['losses'])} steps: {row['losses'][0]:.4f} .. {row['losses'][-1]:.4f}"
    elif row["kind"] == "model":
        text += f"{row['layers']} layers, {row['total'] / 1e6:.0f} M parameters, "
        text += f"{row['active'] / 1e6:.0f} M active"
    else:
        text += row["reason"][:400] + ("\n    " + row["sizes"] if "sizes" in row else "")
    return text


def loss_difference(losses: list[float], others: list[float], window: int = 10) -> dict:
    """The largest difference of two curves, step by step and between means of `window` steps."""
    steps = min(len(losses), len(others))
    differences = [a - b for a, b in zip(losses, others, strict=False)]
    means = [
        sum(differences[i : i + window]) / window for i in range(0, steps - window + 1, window)
    ]
    return {
        "steps": steps,
        "largest": max(map(abs, differences)),
        "largest_of_means": max(map(abs, means), default=None),
    }


def summarize(rows: list[dict]) -> dict:
    """Ratios to the best of torch's grouped_mm, and how far the loss curves are from its."""
    timing = [row for row in rows if row["kind"] == "timing"]
    at: dict[str, dict[str, dict[str, float]]] = {"common": {}, "largest": {}}
    common = min((row["microbatch"] for row in timing), default=0)
    for row in timing:
        place = at["common" if row["microbatch"] == common else "largest"]
        place.setdefault(row["system"], {})[row["mode"]] = row["tokens_per_s"]
    ratios = {}
    for name, systems in at.items():
        baseline = max(
            (s for key in systems if key.startswith("grouped_mm") for s in systems[key].values()),
            default=None,
        )
        if baseline:
            ratios[name] = {key: max(speeds.values()) / baseline for key, speeds in systems.items()}
    curves = {(r["system"], r["mode"]): r["losses"] for r in rows if r["kind"] == "losses"}
    reference = next((c for key, c in curves.items() if key[0] == "grouped_mm"), None)
    differences = {
        f"{system}:{mode}": loss_difference(curve, reference)
        for (system, mode), curve in curves.items()
        if reference
    }
    searches = {f"{r['system']}:{r['mode']}": r["largest"] for r in rows if r["kind"] == "search"}
    return {
        "tokens_per_s_over_best_grouped_mm": ratios,
        "largest_microbatch": searches,
        "losses_against_grouped_mm": differences,
    }


def header(arguments: argparse.Namespace) -> dict:
    import torch
    import transformers

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench.train: torch sees no GPU here (--device cpu runs a tiny model)")
    arguments.gpus = arguments.gpus or torch.cuda.device_count()
    record = new_record(arguments.device)
    record["versions"]["transformers"] = transformers.__version__
    return record


def main() -> int:
    arguments = parse_arguments()
    if arguments.worker:
        return work(arguments)
    runs = Runs(arguments)
    runs.run_all()
    record = runs.record
    record["summary"] = rounded(summarize(record["rows"]))
    write_record(record, arguments.output)
    print(json.dumps(record["summary"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
