"""Entry point: python -m pretrain.compare [flags]: top-K against policies of token rounding.

Trains every policy and top-K from the same seeds on the same tokens, validates all with plain top-K,
and plots the validation curves. Flags of the trainer hold for every run. A run that is there already
is resumed, or taken as it is: metrics.jsonl alone is enough where all its steps are done. With --jobs N
the runs are processes, N at a time, spread over the GPUs there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from .config import POLICIES, Request, TrainConfig, UserError, make_parser, validate
from .gpus import gpu_names
from .signals import Signals, Stopped

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

TOPK = "topk"
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

Results = dict[str, dict[int, list[dict]]]  # lines of metrics by variant and seed


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
    parser = make_parser("compare", "Train with top-K and with token rounding and compare.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each variant")
    parser.add_argument(
        "--policies", metavar="A,B", help="policies compared with top-K (default: that of --policy)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
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
    if "router" in values:
        raise UserError("--router: compare trains both routers")
    if seeds < 1:
        raise UserError(f"--seeds must be positive, not {seeds}")
    if jobs < 1:
        raise UserError(f"--jobs must be positive, not {jobs}")
    config = TrainConfig(**{**defaults, **values}, router="token-rounding")
    validate(config)
    chosen = policies.split(",") if policies else [config.policy]
    for policy in chosen:
        if policy not in POLICIES or chosen.count(policy) > 1:
            raise UserError(
                f"--policies {policies}: expected different ones of {', '.join(POLICIES)}"
            )
    seeds_used = list(range(config.seed, config.seed + seeds))
    return Comparison(config, chosen, seeds_used, jobs, only)


def is_done(config: TrainConfig) -> bool:
    """Whether the metrics of a run reach its last step."""
    from .metrics import read_metrics

    lines = read_metrics(config.run_dir / "metrics.jsonl")
    return bool(lines) and lines[-1]["step"] >= config.steps and "val_loss" in lines[-1]


def train_one(one: TrainConfig, signals: Signals) -> int:
    """Starts or continues a run; returns its exit code."""
    from .trainer import train

    resume = one.run_dir.exists()
    given = {field.name for field in dataclasses.fields(one)} if resume else set()
    return train(Request(one, given, resume), signals)


def run_all(comparison: Comparison, signals: Signals) -> int:
    """Trains every (seed, variant) below runs/NAME/; returns the first exit code that is not 0."""
    for one in comparison.runs():
        print(f"== {one.name}", flush=True)
        if is_done(one):
            continue
        code = train_one(one, signals)
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
    Path(one.runs_dir).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pretrain.compare", *argv, "--only", one.name]
    with open(f"{one.run_dir}.log", "a") as log:
        # A session of its own: a signal to the group would reach the run beside ours, and two end it
        # without saving.
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def run_side_by_side(comparison: Comparison, argv: list[str]) -> int:
    """run_all() with comparison.jobs processes. After a failure no further run is started."""
    waiting = [one for one in comparison.runs() if not is_done(one)]
    running: dict[int, tuple[TrainConfig, subprocess.Popen]] = {}
    first_failure = 0
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
                print(f"== {one.name}: {f'exit code {code}' if code else 'done'}", flush=True)
                if code:
                    first_failure = first_failure or code
                    waiting.clear()
                    print(Path(f"{one.run_dir}.log").read_text()[-2000:], file=sys.stderr)
                else:
                    write_results(comparison)
    finally:  # stopped by a signal: they save and end
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    return first_failure


def read_results(comparison: Comparison) -> Results:
    """Of the runs that are done; a variant without one is left out."""
    from .metrics import read_metrics

    results: Results = {}
    for variant in comparison.variants:
        for seed in comparison.seeds:
            one = comparison.run(variant, seed)
            if is_done(one):
                lines = read_metrics(one.run_dir / "metrics.jsonl")
                results.setdefault(variant, {})[seed] = lines
    return results


def imbalance(shares: list[list[float]]) -> float:
    """Rows of the busiest expert over the mean, averaged over the layers; 1 is even."""
    return statistics.mean(max(layer) * len(layer) / sum(layer) for layer in shares)


def summarize_variant(by_seed: dict[int, list[dict]]) -> dict:
    runs = list(by_seed.values())
    lines = [line for run in runs for line in run]
    asked = sum(line["rows"] + line["rows_dropped"] - line["rows_added"] for line in lines)
    final = [run[-1]["val_loss"] for run in runs]
    return {
        "trained_seeds": list(by_seed),
        "val_loss": final,
        "mean_val_loss": statistics.mean(final),
        "imbalance": statistics.mean(imbalance(run[-1]["expert_shares"]) for run in runs),
        "share_dropped": sum(line["rows_dropped"] for line in lines) / asked,
        "share_added": sum(line["rows_added"] for line in lines) / asked,
        "tokens": runs[0][-1]["tokens"],
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "curve": [[(m["step"], m["val_loss"]) for m in run if "val_loss" in m] for run in runs],
    }


def summarize(results: Results) -> dict[str, dict]:
    """Per variant: final validation losses, their difference from top-K's in percent (means over the
    seeds both have), load balance, shares of rows moved, validation curves."""
    summary = {variant: summarize_variant(runs) for variant, runs in results.items()}
    for variant, figures in summary.items():
        if TOPK in summary:
            base = dict(zip(summary[TOPK]["trained_seeds"], summary[TOPK]["val_loss"], strict=True))
            own = zip(figures["trained_seeds"], figures["val_loss"], strict=True)
            pairs = [(loss, base[seed]) for seed, loss in own if seed in base]
            figures["seeds"] = len(pairs)
            if pairs:
                ours, topk = (statistics.mean(part) for part in zip(*pairs, strict=True))
                figures["difference_percent"] = 100 * (ours / topk - 1)
    return summary


def draw(axes, curves: list[dict[int, float]], **style) -> None:
    """The mean of the curves (value by step) at the steps all have, and a band from the lowest to the
    highest."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    columns = [[curve[step] for curve in curves] for step in steps]
    (line,) = axes.plot(
        steps, [statistics.mean(at) for at in columns], marker="o", markersize=4, **style
    )
    low, high = [min(at) for at in columns], [max(at) for at in columns]
    axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)


def differences_from(curves: dict[int, dict], base: dict[int, dict]) -> list[dict[int, float]]:
    """Percent by step, of the seeds that both have."""
    return [
        {step: 100 * (loss / base[seed][step] - 1) for step, loss in curve.items() if step in base[seed]}
        for seed, curve in curves.items()
        if seed in base
    ]  # fmt: skip


def plot(summary: dict[str, dict], path: Path) -> None:
    """Validation curves of the variants, and below how far each seed's is from top-K's of the seed."""
    from .metrics import new_figure, save_figure

    title = "validation with top-K: training with top-K and with token rounding"
    figure, (above, below) = new_figure(title, panels=2)
    curves = {
        variant: {
            seed: dict(curve)
            for seed, curve in zip(figures["trained_seeds"], figures["curve"], strict=True)
        }
        for variant, figures in summary.items()
    }
    for index, (variant, figures) in enumerate(summary.items()):
        label = f"{variant} {figures['mean_val_loss']:.4f}"
        if variant != TOPK and "difference_percent" in figures:
            label += f" ({figures['difference_percent']:+.2f}%)"
        draw(above, list(curves[variant].values()), label=label, color=f"C{index}")
        if percent := differences_from(curves[variant], curves.get(TOPK, {})):
            draw(below, percent, color=f"C{index}")
    above.legend()
    below.set(ylabel="difference from top-K, %")
    save_figure(figure, path)


def write_results(comparison: Comparison) -> dict[str, dict]:
    """compare.json and compare.png of the runs that are done."""
    summary = summarize(read_results(comparison))
    folder = comparison.config.run_dir
    record = {"config": dataclasses.asdict(comparison.config), "variants": summary}
    (folder / "compare.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(summary, folder / "compare.png")
    return summary


def describe(summary: dict[str, dict]) -> str:
    lines = []
    for variant, figures in summary.items():
        lines.append(
            f"{variant:14} validation loss {figures['mean_val_loss']:.4f} (mean of "
            f"{len(figures['val_loss'])}), {figures['difference_percent']:+.2f}% of top-K's; busiest "
            f"expert {figures['imbalance']:.2f} x mean; rows dropped {figures['share_dropped']:.2%}, "
            f"added {figures['share_added']:.2%}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit codes as of train."""
    from .train import report

    argv = sys.argv[1:] if argv is None else argv
    signals = Signals()
    signals.install()
    try:
        comparison = parse_compare(argv)
        if comparison.only:
            wanted = (one for one in comparison.runs() if one.name == comparison.only)
            return train_one(next(wanted), signals)
        if comparison.jobs > 1:
            code = run_side_by_side(comparison, argv)
        else:
            code = run_all(comparison, signals)
        if code:
            return code
        summary = write_results(comparison)
    except UserError as error:
        return report(error, 2, "compare")
    except (OSError, ArithmeticError, MemoryError) as error:
        return report(error, 1, "compare")
    except Stopped as stop:
        return stop.exit_code
    print(describe(summary))
    print(f"picture: {comparison.config.run_dir / 'compare.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
