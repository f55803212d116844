"""What the runs of a comparison come to: figures by variant, and the picture of their curves."""

from __future__ import annotations

import statistics
from pathlib import Path

from .metrics import new_figure, save_figure

TOPK = "topk"

Results = dict[str, dict[int, list[dict]]]  # lines of metrics by variant and seed


def imbalance(shares: list[list[float]]) -> float:
    """Rows of the busiest expert over the mean, averaged over the layers; 1 is even."""
    return statistics.mean(max(layer) * len(layer) / (sum(layer) or 1) for layer in shares)


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
        "share_dropped": sum(line["rows_dropped"] for line in lines) / (asked or 1),
        "share_added": sum(line["rows_added"] for line in lines) / (asked or 1),
        "tokens": runs[0][-1]["tokens"],
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "curve": [[(m["step"], m["val_loss"]) for m in run if "val_loss" in m] for run in runs],
    }


def summarize(results: Results) -> dict[str, dict]:
    """Per variant: final validation losses, their difference from top-K's in percent (means over
    the seeds both have), load balance, shares of rows moved, validation curves."""
    summary = {variant: summarize_variant(runs) for variant, runs in results.items()}
    for figures in summary.values():
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
    """The mean of the curves (value by step) at the steps all have, and a band from the lowest to
    the highest."""
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
        {
            step: 100 * (loss / base[seed][step] - 1)
            for step, loss in curve.items()
            if step in base[seed]
        }
        for seed, curve in curves.items()
        if seed in base
    ]  # fmt: skip


def plot(summary: dict[str, dict], path: Path) -> None:
    """Validation curves of the variants, and below how far each seed's is from top-K's of the
    seed."""
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
