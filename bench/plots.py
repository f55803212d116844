"""Draws docs/images/bench-h200.png, bench-h100.png (bench/lib/speed_bars.py) and
workspace-limit.png from the newest records of bench/results/h?00-*.json that hold such rows. Needs
no GPU.

Speeds are model TFLOP/s (6*T*K*n*d FLOPs forward, twice that backward).

With --markdown it writes the tables of the pages of bench/lib/tables.py and draws nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

from bench.lib.problem import MIB
from bench.lib.record import REPOSITORY, RESULTS, has_row, newest, read_records
from bench.lib.speed_bars import PICTURES, draw
from bench.lib.summary import load_anchors
from bench.lib.tables import PAGES, of_device, tables, with_tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES = REPOSITORY / "docs" / "images"


def plot_limits(record: dict, path: Path) -> None:
    """Milliseconds of forward and backward under every limit that they accept."""
    rows = [row for row in record["rows"] if row["case"] == "limit"]
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for part, label, color in (
        ("fwd", "forward", "tab:blue"),
        ("bwd", "backward", "tab:orange"),
    ):
        points = [row for row in rows if f"{part}_ms" in row]
        free = next(row for row in points if row["limit_mib"] is None)
        limited = [row for row in points if row["limit_mib"] is not None]
        axes.plot([row["limit_mib"] / 1024 for row in limited],
                  [row[f"{part}_ms"] for row in limited],
                  "o-", color=color, label=label)  # fmt: skip
        axes.axhline(free[f"{part}_ms"], color=color, ls="--", lw=1)
        text = f"no limit: {free[f'{part}_ms']:.1f} ms, {free[f'peak_{part}_mib'] / 1024:.2f} GiB"
        axes.annotate(text, (1.0, free[f"{part}_ms"]), xycoords=("axes fraction", "data"),
                      xytext=(-6, 8), textcoords="offset points", ha="right", va="bottom",
                      fontsize=8, color=color)  # fmt: skip
    axes.set_xscale("log", base=2)
    limits = {row["limit_mib"] for row in rows if row["limit_mib"] is not None}
    axes.set_xticks(sorted(limit / 1024 for limit in limits if limit % 256 == 0))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("workspace_limit, GiB")
    axes.set_ylabel("ms")
    axes.set_title(f"{rows[0]['shape']} on {record['device']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_cpu(rows: list[dict], path: Path) -> None:
    """Rows of bench/cpu.py: speed and memory of both systems."""
    figure, (rates, memory) = plt.subplots(2, 1, figsize=(8.5, 6.4), layout="constrained")
    flops = [18.0 * r["shape"][0] * r["shape"][4] * r["shape"][2] * r["shape"][1] for r in rows]
    for offset, system in ((-0.2, "sonicmoe_cpp"), (0.2, "torch_grouped_mm")):
        places = [i + offset for i in range(len(rows))]
        ms = [row[system]["total"]["median_ms"] for row in rows]
        speed = [f / t / 1e6 for f, t in zip(flops, ms, strict=True)]
        rates.bar(places, speed, 0.4, label=system)
        memory.bar(places, [r[system]["kept_bytes"] / MIB for r in rows], 0.4, label=system)
    rates.set_ylabel("model GFLOP/s, forward + backward")
    memory.set_ylabel("MiB kept for backward")
    for axes in (rates, memory):
        axes.set_xticks(range(len(rows)), [f"{row['name']}\n{row['dtype']}" for row in rows])
        axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws the GPU records of bench/results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the pictures")
    parser.add_argument("--markdown", action="store_true", help="write the pages' tables")
    arguments = parser.parse_args()
    if arguments.markdown:
        found = tables(arguments.results)
        for page in PAGES:
            page.write_text(with_tables(page.read_text(), found))
        return 0

    records = read_records(arguments.results, "h?00-*.json")
    arguments.images.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        if layer := newest(records, of_device(picture.gpu, "system", "sonicmoe")):
            draw(layer, picture, load_anchors(), arguments.images / picture.file)
    if cases := newest(records, has_row("case", "limit")):
        plot_limits(cases, arguments.images / "workspace-limit.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
