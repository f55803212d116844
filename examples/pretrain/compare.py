"""Entry point: python -m pretrain.compare [flags]: top-K against token rounding.

Trains both from the same seeds, validates both with plain top-K, and plots the validation curves.
Flags of the trainer hold for every run. A run that is already there is resumed, or taken as it is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
from pathlib import Path

from .config import Request, TrainConfig, UserError, make_parser, validate
from .signals import Signals, Stopped

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROUTERS = ("topk", "token-rounding")
DEFAULTS = {"name": "compare", "steps": 400, "eval_every": 100, "sample_tokens": 0}


def parse_compare(argv: list[str]) -> tuple[TrainConfig, int]:
    parser = make_parser("compare", "Train with top-K and with token rounding and compare.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each router")
    values = vars(parser.parse_args(argv))
    seeds = values.pop("seeds")
    if "router" in values:
        raise UserError("--router: compare trains both routers")
    if seeds < 1:
        raise UserError(f"--seeds must be positive, not {seeds}")
    config = TrainConfig(**{**DEFAULTS, **values}, router="token-rounding")
    validate(config)
    return config, seeds


def run_all(config: TrainConfig, seeds: int, signals: Signals) -> int:
    """Trains every (seed, router) below runs/NAME/; returns the first exit code that is not 0."""
    from .trainer import train

    for seed in range(config.seed, config.seed + seeds):
        for router in ROUTERS:
            one = dataclasses.replace(
                config,
                runs_dir=str(config.run_dir),
                name=f"{router}-{seed}",
                router=router,
                seed=seed,
            )
            resume = one.run_dir.exists()
            given = {field.name for field in dataclasses.fields(one)} if resume else set()
            print(f"== {router}, seed {seed}", flush=True)
            code = train(Request(one, given, resume), signals)
            if code:
                return code
    return 0


def read_results(config: TrainConfig, seeds: int) -> dict[str, list[list[dict]]]:
    from .metrics import read_metrics

    return {
        router: [
            read_metrics(config.run_dir / f"{router}-{seed}" / "metrics.jsonl")
            for seed in range(config.seed, config.seed + seeds)
        ]
        for router in ROUTERS
    }


def summarize(results: dict[str, list[list[dict]]]) -> dict:
    """Final validation losses, their difference in percent, and the shares of rows moved."""
    final = {router: [run[-1]["val_loss"] for run in runs] for router, runs in results.items()}
    mean = {router: statistics.mean(losses) for router, losses in final.items()}
    rounded = [line for run in results["token-rounding"] for line in run]
    asked = sum(line["rows"] + line["rows_dropped"] - line["rows_added"] for line in rounded)
    return {
        "val_loss": final,
        "mean_val_loss": mean,
        "difference_percent": 100 * (mean["token-rounding"] / mean["topk"] - 1),
        "share_dropped": sum(line["rows_dropped"] for line in rounded) / asked,
        "share_added": sum(line["rows_added"] for line in rounded) / asked,
    }


def plot(results: dict[str, list[list[dict]]], summary: dict, path: Path) -> None:
    """Mean validation curve of each router with a band from the lowest to the highest seed."""
    from .metrics import new_figure, save_figure

    figure, axes = new_figure(
        f"token rounding drops {summary['share_dropped']:.1%} and adds "
        f"{summary['share_added']:.1%} of the rows; validation with top-K"
    )
    for router, runs in results.items():
        curves = [[(m["step"], m["val_loss"]) for m in run if "val_loss" in m] for run in runs]
        steps = [step for step, _ in curves[0]]
        losses = [[curve[i][1] for curve in curves] for i in range(len(steps))]
        (line,) = axes.plot(
            steps, [statistics.mean(at) for at in losses], marker="o", markersize=4, label=router
        )
        axes.fill_between(
            steps,
            [min(at) for at in losses],
            [max(at) for at in losses],
            color=line.get_color(),
            alpha=0.2,
        )
    axes.legend()
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Exit codes as of train."""
    from .train import report

    signals = Signals()
    signals.install()
    try:
        config, seeds = parse_compare(sys.argv[1:] if argv is None else argv)
        code = run_all(config, seeds, signals)
        if code:
            return code
        results = read_results(config, seeds)
        summary = summarize(results)
        plot(results, summary, config.run_dir / "compare.png")
        (config.run_dir / "compare.json").write_text(json.dumps(summary, indent=2) + "\n")
    except UserError as error:
        return report(error, 2, "compare")
    except (OSError, ArithmeticError) as error:
        return report(error, 1, "compare")
    except Stopped as stop:
        return stop.exit_code
    mean = summary["mean_val_loss"]
    print(
        f"validation loss (mean of {seeds}): top-K {mean['topk']:.4f}, token rounding "
        f"{mean['token-rounding']:.4f}, difference {summary['difference_percent']:+.2f}%"
    )
    print(
        f"rows dropped {summary['share_dropped']:.2%}, added {summary['share_added']:.2%}; "
        f"picture: {config.run_dir / 'compare.png'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
