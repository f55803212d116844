"""Entry point: python -m trainer.compare [flags]: top-K against policies of token rounding.

Trains every policy and top-K from the same seeds on the same tokens, validates all with plain
top-K, and plots the validation curves. Flags of the trainer hold for every run. A run that is there
already is resumed, or taken as it is: config.json and metrics.jsonl are enough where all its steps
are done. With --jobs N the runs are processes, N at a time, spread over the GPUs there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from . import files, program
from .config import POLICIES, TrainConfig, read_config, validate
from .gpus import gpu_names
from .request import Request, with_file
from .schema import Parser, UserError, flag_of, read_json, whole
from .signals import Signals
from .summary import TOPK, Results, plot, summarize

DEFAULTS = {"name": "compare", "steps": 400, "eval_every": 100, "sample_tokens": 0}
# 175 M parameters, 24 M of them active for a token; E / K = 16; 16384 tokens a step, so that an
# expert gets 1024 rows on average, 8 tiles of 128.
QUALITY = {
    "name": "quality",
    "steps": 4000,
    "batch_size": 16,
    "seq_len": 1024,
    "hidden_size": 512,
    "intermediate_size": 128,
    "layers": 6,
    "heads": 8,
    "num_experts": 128,
    "top_k": 8,
    "tile": 128,
    "lr": 1e-3,
    "warmup": 200,
    "eval_every": 500,
    "eval_tokens": 1 << 20,
    "save_every": 2000,
}

# The settings that do not shape a run's curve: a comparison may go on with others.
FREE = {
    "name", "runs_dir", "device", "threads", "report_to", "save_every", "sample_tokens",
    "sample_prompt",
}  # fmt: skip
RECORD = {"config", "variants"}  # what compare.json holds


@dataclasses.dataclass
class Comparison:
    config: TrainConfig  # of every run, but for name, router, policy and seed
    policies: list[str]
    seeds: list[int]
    jobs: int = 1  # runs at a time
    only: str = ""  # the one run that a process of several trains

    @property
    def variants(self) -> list[str]:
        return [TOPK, *self.policies]

    def runs(self) -> list[TrainConfig]:
        return [self.run(variant, seed) for seed in self.seeds for variant in self.variants]

    def run(self, variant: str, seed: int) -> TrainConfig:
        rounding = {} if variant == TOPK else {"policy": variant}
        return dataclasses.replace(
            self.config,
            runs_dir=str(self.config.run_dir),
            name=f"{variant}-{seed}",
            router=TOPK if variant == TOPK else "token-rounding",
            seed=seed,
            **rounding,
        )


def parse_compare(argv: list[str]) -> Comparison:
    parser = Parser("compare", "Train with top-K and with token rounding and compare.")
    parser.add_settings(TrainConfig)
    parser.add("--seeds", whole(1, 1000), "runs of each variant", default=3, metavar="N")
    parser.add_argument(
        "--policies", metavar="A,B", help="policies compared with top-K (default: that of --policy)"
    )
    parser.add("--jobs", whole(1, 1000), "runs at a time", default=1, metavar="N")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    parser.add_argument(
        "--quality",
        action="store_true",
        help="defaults of the study of docs/guide/training.md: 175 M parameters, for a GPU",
    )
    values = vars(parser.parse_args(argv))
    seeds, policies = values.pop("seeds"), values.pop("policies")
    jobs, only = values.pop("jobs"), values.pop("only")
    defaults = DEFAULTS | (QUALITY if values.pop("quality") else {})
    values = with_file(values)
    if "router" in values:
        raise UserError("--router: compare trains both routers")
    config = TrainConfig(**{**defaults, **values}, router="token-rounding")
    chosen = [config.policy] if policies is None else policies.split(",")
    for policy in chosen:
        if policy not in POLICIES or chosen.count(policy) > 1:
            raise UserError(
                f"--policies {policies}: expected different ones of {', '.join(POLICIES)}"
            )
    validate(config)
    seeds_used = list(range(config.seed, config.seed + seeds))
    comparison = Comparison(config, chosen, seeds_used, jobs, only)
    for one in comparison.runs():
        validate(one)
    if only and only not in [one.name for one in comparison.runs()]:
        raise UserError(f"--only {only}: no run of this comparison")
    return comparison


def check_folder(comparison: Comparison) -> str:
    """UserError unless what is in runs/NAME/ is of this very comparison. The digest of the text
    that its runs have in common; empty before the first."""
    folder = comparison.config.run_dir
    record, picture = folder / "compare.json", folder / "compare.png"
    if os.path.lexists(folder / "config.json") or (os.path.lexists(folder) and not folder.is_dir()):
        raise UserError(f"--name: {folder} is there and no comparison")
    if os.path.lexists(record):
        content = read_json(record)
        if type(content) is not dict or content.keys() != RECORD:
            raise UserError(f"--name: {record} is there and not of a comparison")
    elif os.path.lexists(picture):
        raise UserError(f"--name: {picture} is there and not of a comparison")
    digests = {}
    for one in comparison.runs():
        if os.path.lexists(one.run_dir):
            saved, digests[one.name] = read_config(one.run_dir)
            _check_same(saved, one)
    if len(set(digests.values())) > 1:
        raise UserError(f"{folder}: its runs were trained on different texts: {', '.join(digests)}")
    return next(iter(digests.values()), "")


def _check_same(saved: TrainConfig, wanted: TrainConfig) -> None:
    for field in dataclasses.fields(TrainConfig):
        before, now = getattr(saved, field.name), getattr(wanted, field.name)
        settled = field.name == "dtype" and now == "auto"
        if field.name not in FREE and before != now and not settled:
            raise UserError(
                f"{flag_of(field.name)} is {now}, but {wanted.run_dir} was trained with {before}: "
                f"--name NAME starts another comparison"
            )


def is_done(config: TrainConfig) -> bool:
    """Whether the metrics of a run reach its last step."""
    return bool(_lines(config))


def _lines(config: TrainConfig) -> list[dict]:
    """The metrics of a run that is done, else none. UserError where they begin late: their sums
    would be wrong."""
    from .metrics import AT_VALIDATIONS, read_metrics

    place = config.run_dir / "metrics.jsonl"
    lines = read_metrics(place)
    if not lines or lines[-1]["step"] < config.steps:
        return []
    if lines[0]["step"] != 1 or not lines[-1].keys() >= AT_VALIDATIONS:
        raise UserError(
            f"{place}: expected steps from 1 to {config.steps}, the last with a validation"
        )
    return lines


def train_one(one: TrainConfig, digest: str, signals: Signals) -> int:
    """Starts or continues a run on the text of that digest; returns its exit code."""
    from .start import train

    resume = os.path.lexists(one.run_dir)
    given = {field.name for field in dataclasses.fields(one)} if resume else set()
    code = train(Request(one, given, resume, digest=digest), signals)
    if not code and not is_done(one):
        raise UserError(f"{one.run_dir}: its metrics.jsonl does not reach its last step")
    return code


def run_all(comparison: Comparison, signals: Signals) -> int:
    """Trains every (seed, variant) below runs/NAME/; returns the first exit code that is not 0."""
    for one in comparison.runs():
        program.say(f"== {one.name}")
        if is_done(one):
            continue
        code = train_one(one, check_folder(comparison), signals)
        if code:
            return code
        write_results(comparison)
    return 0


def start_run(one: TrainConfig, argv: list[str], job: int, jobs: int) -> subprocess.Popen:
    """This program for one run, on the GPU of its job; what it prints goes to runs/NAME/RUN.log."""
    import torch

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if names := gpu_names(torch.cuda.device_count()):
        environment["CUDA_VISIBLE_DEVICES"] = names[job % len(names)]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    try:
        Path(one.runs_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs-dir: {error.filename}: {error.strerror}") from error
    command = [sys.executable, "-m", "trainer.compare", *argv, "--only", one.name]
    with open(f"{one.run_dir}.log", "a") as log:
        # A session of its own: a signal to the group would reach the run beside ours, and two end
        # it without saving.
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def run_side_by_side(comparison: Comparison, argv: list[str]) -> int:
    """run_all() with comparison.jobs processes. After a failure no further run is started; its line
    is reported at the end."""
    waiting = [one for one in comparison.runs() if not is_done(one)]
    running: dict[int, tuple[TrainConfig, subprocess.Popen]] = {}
    failed = None
    try:
        while waiting or running:
            for job in set(range(comparison.jobs)) - running.keys():
                if waiting:
                    one = waiting.pop(0)
                    running[job] = one, start_run(one, argv, job, comparison.jobs)
            time.sleep(0.2)
            for job, (one, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[job]
                program.say(f"== {one.name}: {f'exit code {code}' if code else 'done'}")
                if not code:
                    write_results(comparison)
                elif not failed:
                    failed = one, code
                    waiting.clear()
    finally:  # stopped by a signal: they save and end
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    if not failed:
        return 0
    one, code = failed
    log = Path(f"{one.run_dir}.log")
    told = files.read_bytes(log).decode(errors="replace").strip().splitlines() or [""]
    error = UserError(f"run {one.name}: {told[-1]} (all of it is in {log})")
    return program.report(error, code if code > 0 else 128 - code, "compare")


def read_results(comparison: Comparison) -> Results:
    """Of the runs that are done; a variant without one is left out."""
    results: Results = {}
    for variant in comparison.variants:
        for seed in comparison.seeds:
            if lines := _lines(comparison.run(variant, seed)):
                results.setdefault(variant, {})[seed] = lines
    return results


def write_results(comparison: Comparison) -> dict[str, dict]:
    """compare.json and compare.png of the runs that are done."""
    summary = summarize(read_results(comparison))
    folder = comparison.config.run_dir
    record = {"config": dataclasses.asdict(comparison.config), "variants": summary}
    files.write_text(folder / "compare.json", json.dumps(record, indent=1) + "\n")
    plot(summary, folder / "compare.png")
    return summary


def describe(summary: dict[str, dict]) -> str:
    lines = []
    for variant, figures in summary.items():
        lines.append(
            f"{variant:14} validation loss {figures['mean_val_loss']:.4f} (mean of "
            f"{len(figures['val_loss'])}), {figures['difference_percent']:+.2f}% of top-K's; "
            f"busiest expert {figures['imbalance']:.2f} x mean; "
            f"rows dropped {figures['share_dropped']:.2%}, added {figures['share_added']:.2%}"
        )
    return "\n".join(lines)


def work(argv: list[str], signals: Signals) -> int:
    comparison = parse_compare(argv)
    digest = check_folder(comparison)
    if comparison.only:
        wanted = next(one for one in comparison.runs() if one.name == comparison.only)
        return train_one(wanted, digest, signals)
    if comparison.jobs > 1:
        code = run_side_by_side(comparison, argv)
    else:
        code = run_all(comparison, signals)
    if code:
        return code
    program.say(describe(write_results(comparison)))
    program.say(f"picture: {comparison.config.run_dir / 'compare.png'}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes as of program.run."""
    return program.run("compare", work, argv)


if __name__ == "__main__":
    sys.exit(main())
