"""The layer beside another kernel that holds some of the GPU, such as NCCL's.

Forward and backward of the whole layer, alone and beside the other kernel, with strided tiles where
they are faster alone (sm.set_shared_device(False)) and with all tiles in order (True). Kernel times
(CUPTI), medians of the rounds, everything in turns in one process. The other kernel is

    on several GPUs   all_gather_into_tensor of --mib MiB a rank, without a pause (torchrun)
    on one GPU        lab/occupy.cu: --ctas CTAs that copy --mib MiB, without a pause

    torchrun --nproc-per-node 2 -m bench.shared --output bench/results/shared-h200-$(date +%F).json
    python -m bench.shared --stand-in build/lab/liboccupy.so --ctas 24
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import sonicmoe_cpp as sm
import torch
import torch.distributed as dist

from bench.compare_builds import LEAST_SHARE, known_problems, short_name
from bench.layer import EagerLayer
from bench.lib.problem import MIB, problem_named
from bench.lib.profile import device_spans
from bench.lib.record import new_record, rounded, write_record
from bench.lib.timing import Clock, require_gpu
from bench.systems import systems_named

CALLS = 6  # of the layer in one profile; the first one only brings the load up
OTHERS = ("occupy_kernel", "nccl")
Load = Callable[[], None]  # enqueues one millisecond or so of the other kernel


def gather_load(mib: int) -> Load:
    part = torch.zeros(mib * MIB // 2, dtype=torch.bfloat16, device="cuda")
    whole = part.new_empty(part.numel() * dist.get_world_size())
    return lambda: dist.all_gather_into_tensor(whole, part)


def stand_in_load(library: Path, ctas: int, mib: int) -> Load:
    occupy = ctypes.CDLL(str(library.resolve())).occupy
    occupy.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_void_p]
    source = torch.zeros(mib * MIB, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)

    def enqueue() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        status = occupy(ctas, source.data_ptr(), copy.data_ptr(), source.numel(), stream)
        if status:
            raise SystemExit(f"bench.shared: the stand-in was refused: CUDA error {status}")

    return enqueue


def milliseconds(call: Callable[[], object]) -> float:
    clock = Clock()
    begin = clock.mark()
    call()
    end = clock.mark()
    clock.wait()
    return clock.ms(begin, end)


def kernel_us(call: Callable[[], object], load: Load | None, loads: int) -> dict[str, float]:
    """Microseconds of each of the layer's kernels in a call, mean of all but the first."""
    side = torch.cuda.Stream()

    def run() -> None:
        if load is not None:
            with torch.cuda.stream(side):
                for _ in range(loads):
                    load()
        for _ in range(CALLS):
            call()

    times: dict[str, list[float]] = {}
    for span in device_spans(run):
        if not any(other in span.name for other in OTHERS):
            times.setdefault(short_name(span.name), []).append(span.end - span.start)
    return {
        name: sum(us[len(us) // CALLS :]) / (CALLS - 1)
        for name, us in times.items()
        if len(us) >= CALLS
    }


def agreed(count: int) -> int:
    """Rank 0's: every rank takes part in as many collectives."""
    if dist.is_initialized():
        counts = torch.tensor([count], device="cuda")
        dist.broadcast(counts, 0)
        return int(counts.item())
    return count


def rows_of(problem: str, load: Load, rounds: int) -> list[dict]:
    (system,) = systems_named(["sonicmoe"])
    layer = EagerLayer(problem_named(problem), system)

    def call() -> object:
        return layer.backward(layer.forward())

    call()
    load()
    torch.cuda.synchronize()
    # So many that the load outlasts the calls, which take up to twice as long beside it.
    loads = agreed(int(4 * CALLS * milliseconds(call) / max(milliseconds(load), 0.05)) + 1)
    found: dict[tuple[bool, bool], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for beside in (False, True):
            for shared in (False, True):
                sm.set_shared_device(shared)
                times = kernel_us(call, load if beside else None, loads)
                found.setdefault((shared, beside), []).append(times)
    sm.set_shared_device(None)

    def median(shared: bool, beside: bool, kernel: str) -> float:
        return statistics.median(times.get(kernel, 0.0) for times in found[shared, beside])

    kernels = {kernel: median(False, False, kernel) for kernel in found[False, False][0]}
    least = LEAST_SHARE * sum(kernels.values())
    return [
        {
            "problem": problem,
            "kernel": kernel,
            "strided_us": us,
            "strided_beside_us": median(False, True, kernel),
            "in_order_us": median(True, False, kernel),
            "in_order_beside_us": median(True, True, kernel),
        }
        for kernel, us in sorted(kernels.items(), key=lambda item: -item[1])
        if us >= least
    ]


def show(row: dict) -> None:
    """Times as multiples of the strided one alone."""
    alone = row["strided_us"]
    names = ("strided_beside_us", "in_order_us", "in_order_beside_us")
    ratios = "".join(f"{row[name] / alone:10.3f}" for name in names)
    print(f"{row['problem']:20}{row['kernel']:28}{alone:10.1f}{ratios}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--problem", action="append", choices=known_problems(), help="default: 7B-n256")
    add("--mib", type=int, default=256, help="MiB of one collective (a rank's part) or copy")
    add("--stand-in", type=Path, help="build/lab/liboccupy.so, on one GPU")
    add("--ctas", type=int, default=24, help="multiprocessors that the stand-in holds")
    add("--rounds", type=int, default=5)
    add("--output", type=Path, help="write the record here (JSON)")
    arguments = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if (ranks == 1) == (arguments.stand_in is None):
        parser.error("give --stand-in on one GPU, or start several ranks with torchrun")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(rank)
    require_gpu()
    if ranks > 1:
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
        load = gather_load(arguments.mib)
    else:
        load = stand_in_load(arguments.stand_in, arguments.ctas, arguments.mib)
    record = new_record(gpus=ranks, stand_in_ctas=arguments.ctas if ranks == 1 else None)
    if rank == 0:
        header = ("alone, us", "beside", "in order", "beside")
        print(f"{'':48}" + "".join(f"{title:>10}" for title in header))
    for problem in arguments.problem or ["7B-n256"]:
        for row in rows_of(problem, load, arguments.rounds):
            record["rows"].append(rounded(row))
            if rank == 0:
                show(row)
    if rank == 0 and arguments.output:
        write_record(record, arguments.output)
    if ranks > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
