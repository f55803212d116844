"""Starts the processes of --gpus and --processes through torch's elastic launcher, as torchrun
does."""

from __future__ import annotations

import logging
import os
import signal
import sys

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from . import checkpoint
from .config import TrainConfig
from .group import LAUNCHED
from .layout import Layout
from .request import Request, settled
from .schema import UserError

GRACE_S = 600  # for a last step and its checkpoint, once a signal has come
AT_ONCE_S = 5  # between failures of one cause


def launch(argv: list[str], request: Request) -> int:
    """Runs `trainer.train argv` in every process; returns the exit code of all. What can be refused
    is refused before there are any."""
    checkpoint.remove_killed_starts(request.config.run_dir.parent)
    config, _ = settled(request)
    if not request.resume:
        checkpoint.check_free(config.run_dir, request.overwrite)
    _check_gpus(request.layout)
    # Each has its share of the cores, and no warnings of connections that end with a process.
    threads = max(1, len(os.sched_getaffinity(0)) // request.layout.asked)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable(logging.ERROR)  # the launcher's report of each process
    start = elastic_launch(_configuration(request.layout), sys.executable)
    try:
        start("-m", "trainer.train", *argv, "--name", config.name)
    except ChildFailedError as failed:
        return _told(failed.failures, config)
    except SignalException as stopped:  # the first process has said what is saved
        return 128 + stopped.sigval
    return 0


def _check_gpus(layout: Layout) -> None:
    there = torch.cuda.device_count()
    if layout.gpus > there:
        raise UserError(f"--gpus {layout.gpus}: expected at most the {there} that torch sees")


def _configuration(layout: Layout) -> LaunchConfig:
    signals = ["SIGTERM", "SIGINT", "SIGQUIT"]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signals.append("SIGHUP")
    return LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=layout.asked, run_id=LAUNCHED,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        signals_to_handle=",".join(signals), shutdown_timeout=GRACE_S,
    )  # fmt: skip


def _told(failures: dict[int, ProcessFailure], config: TrainConfig) -> int:
    """The exit code; OSError for what no process can have told: that one was killed."""
    begin = min(failure.timestamp for failure in failures.values())
    # What ends later was ended by the launcher.
    first = {r: f for r, f in failures.items() if f.timestamp <= begin + AT_ONCE_S}
    killed = {rank: failure for rank, failure in first.items() if failure.exitcode < 0}
    if not killed:
        return first[min(first)].exitcode
    rank = min(killed)
    kept = checkpoint.last_good(config.run_dir)
    raise OSError(
        f"process {rank} was ended by {killed[rank].signal_name()}, and the others with it; {kept}"
        f"; --resume --name {config.name} goes on from it"
    )
