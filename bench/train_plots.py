"""Draws records of bench/train.py: tokens/s, largest microbatch, the step's parts and the losses.

    python -m bench.train_plots bench/results/train-h200-2026-11-28.json --output
    docs/images/train-gpu.png

Several records, of one machine and model, are taken together.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

from bench.lib.train_worker import KINDS
from bench.train import summarize

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW = 10  # steps of a mean of the losses
FAR_OFF = 4  # times the median step
MOST = 6  # systems in the picture
FIRST = [(system, mode) for mode in ("plain", "compile", "compile+graph")
         for system in ("sonicmoe", "grouped_mm")]  # fmt: skip


def label(row: dict) -> str:
    return f"{row['system']}\n{row['mode']}"


def few_systems(rows: list[dict]) -> list[dict]:
    """Rows of at most MOST systems, those of FIRST before others and in their order."""
    found = dict.fromkeys((row["system"], row["mode"]) for row in of_kind(rows, "timing"))
    order = [*filter(found.__contains__, FIRST), *(pair for pair in found if pair not in FIRST)]
    rank = {pair: place for place, pair in enumerate(order[:MOST])}
    kept = [row for row in rows if (row.get("system"), row.get("mode")) in rank]
    return sorted(kept, key=lambda row: rank[row["system"], row["mode"]])


def of_kind(rows: list[dict], kind: str) -> list[dict]:
    return [row for row in rows if row["kind"] == kind]


def draw_speeds(axes, rows: list[dict]) -> None:
    """Tokens/s at the common microbatch, and at the largest."""
    timing = of_kind(rows, "timing")
    common = min(row["microbatch"] for row in timing)
    names = list(dict.fromkeys(map(label, timing)))
    for row in timing:
        place, first = names.index(label(row)), row["microbatch"] == common
        height = row["tokens_per_s"] / 1e3
        axes.bar(place + (-0.2 if first else 0.2), height, 0.38,
                 color="tab:blue" if first else "tab:orange")  # fmt: skip
        text = f"{height:.0f}\n{row['microbatch']} seq."
        axes.text(place + (-0.2 if first else 0.2), height, text,
                  ha="center", va="bottom", fontsize=8)  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.margins(y=0.2)
    axes.set_ylabel("thousand tokens/s")
    axes.set_title("common (blue) and largest microbatch", fontsize=10)


def draw_parts(axes, rows: list[dict]) -> None:
    """Milliseconds of a step by kind of kernel, at the common microbatch. A system that takes
    several times as long as the others is named and not drawn."""
    timing = [row for row in of_kind(rows, "timing") if "kernels" in row]
    common = min((row["microbatch"] for row in timing), default=0)
    timing = [row for row in timing if row["microbatch"] == common]
    most = FAR_OFF * statistics.median([row["step_ms"] for row in timing] or [0])
    shown = [row for row in timing if row["step_ms"] <= most]
    far = [f"{row['system']} {row['step_ms']:.0f} ms" for row in timing if row["step_ms"] > most]
    bottom = [0.0] * len(shown)
    for kind in (*KINDS, "pointwise"):
        heights = [row["kernels"].get(kind, 0.0) for row in shown]
        axes.bar(range(len(shown)), heights, 0.7, bottom=bottom, label=kind)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.plot(range(len(shown)), [row["step_ms"] for row in shown], "k_", ms=14, label="step, wall")
    axes.set_xticks(range(len(shown)), map(label, shown))
    axes.set_ylabel("ms")
    title = ", ".join(
        [f"GPU time of a step, {common} sequences", *(f"not shown: {f}" for f in far)]
    )
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, ncols=2)


def draw_losses(axes, rows: list[dict]) -> None:
    for row in of_kind(rows, "losses"):
        losses = row["losses"]
        starts = range(0, len(losses) - WINDOW + 1, WINDOW)
        means = [sum(losses[i : i + WINDOW]) / WINDOW for i in starts]
        axes.plot(
            [i + WINDOW / 2 for i in starts], means, lw=1, label=label(row).replace("\n", " ")
        )
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_title(f"cross-entropy, means of {WINDOW} steps", fontsize=10)
    axes.legend(fontsize=8, ncols=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    records = [json.loads(path.read_text()) for path in arguments.records]
    rows = [row for record in records for row in record["rows"]]
    figure, panels = plt.subplots(3, 1, figsize=(8.5, 11), layout="constrained")
    for axes, draw in zip(panels, (draw_speeds, draw_parts, draw_losses), strict=True):
        draw(axes, few_systems(rows))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    model, versions = of_kind(rows, "model")[0], records[0]["versions"]
    figure.supxlabel(
        f"Qwen3-MoE, {model['layers']} layers, {model['total'] / 1e9:.2f} G parameters, "
        f"{model['active'] / 1e6:.0f} M active; {records[0]['device']}, torch {versions['torch']}, "
        f"{records[0]['date'][:10]}",
        fontsize=9,
    )
    figure.savefig(arguments.output, dpi=150)
    print(json.dumps(summarize(rows), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
