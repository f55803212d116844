"""Draws docs/images/bench-gpu.png and workspace-limit.png from the newest records of
bench/results/h?00-*.json that hold such rows. Needs no GPU.

Speeds are model TFLOP/s (6*T*K*n*d FLOPs forward, twice that backward). Ours and torch's are wall
time; the official layer, of the same record or of anchors.json, and the other systems of the latter
show the better of wall and busy time, the official layer as CUDA graphs where the newest
graphs-h?00-*.json has it, and what the paper printed is a line.

With --markdown it writes the tables of the pages of bench/lib/tables.py and draws nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

from bench.lib.problem import MIB
from bench.lib.record import REPOSITORY, RESULTS, has_row, newest, read_records
from bench.lib.summary import (
    CEILING,
    PEER,
    Speed,
    best_speed,
    load_anchors,
    measured_speed,
    peer_speed,
)
from bench.lib.tables import PAGES, tables, with_tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES = REPOSITORY / "docs" / "images"
BARS = {  # system: label, colour; * marks those whose better time is shown
    "sonicmoe": ("sonicmoe", "tab:blue"),
    "sonicmoe-atomic": ("sonicmoe, atomic sums", "tab:cyan"),
    "sonic-moe": ("sonic-moe 0.1.2 (official)*", "tab:orange"),
    "ScatterMoE": ("ScatterMoE*", "tab:green"),
    "MoMoE": ("MoMoE*", "tab:purple"),
    "torch-grouped_mm-compiled": ("torch grouped_mm, all compiled", "dimgray"),
    "torch-grouped_mm": ("torch grouped_mm", "silver"),
}
NUMBERED = ("sonicmoe", "sonicmoe-atomic")
LINES = {  # across a shape's bars: label, style
    CEILING: ("cuBLAS bmm, the GEMMs alone", {"color": "black", "lw": 1.5}),
    "paper": ("SonicMoE, the paper's", {"color": "tab:red", "lw": 1.2, "ls": (0, (2, 1))}),
}


def peer_graphs(record: dict, graphs: dict | None) -> dict[str, Speed]:
    """The official layer as CUDA graphs, by the record's shapes: its own, else of `graphs`."""
    shapes = {row["shape"] for row in record["rows"] if "fwd_ms" in row}
    rows = (graphs["rows"] if graphs else []) + record["rows"]
    return {
        row["shape"]: speed
        for row in rows
        if row["shape"] in shapes and row["system"] == PEER and (speed := peer_speed(row, "graph"))
    }


def speeds(record: dict, anchors: dict, graphs: dict | None = None) -> dict[str, dict[str, Speed]]:
    """Speeds by shape and system; the record's shapes, in its order."""
    table: dict[str, dict[str, Speed]] = {}
    for row in record["rows"]:
        if "fwd_ms" in row:
            speed = best_speed if row["system"] == PEER else measured_speed
            table.setdefault(row["shape"], {})[row["system"]] = speed(row)
    for shape, speed in peer_graphs(record, graphs).items():
        table[shape][PEER] = speed
    for row in anchors["rows"]:
        if row["shape"] in table and row["system"] != CEILING:  # ours is of the record's machine
            table[row["shape"]].setdefault(row["system"], best_speed(row))
    return table


def timed_here(record: dict) -> set[tuple[str, str]]:
    """The shapes and systems that anchors.json does not stand in for."""
    return {(row["shape"], row["system"]) for row in record["rows"] if "fwd_ms" in row}


def draw_group(
    axes, place: int, systems: dict[str, Speed], direction: int, width: float, here: set[str]
) -> None:
    """The bars of one shape side by side, and lines across them; hatched: not timed here."""
    shown = [system for system in BARS if system in systems]
    for i, system in enumerate(shown):
        x = place + (i - (len(shown) - 1) / 2) * width
        height = systems[system][direction]
        hatch = "" if system in here else "////"
        axes.bar(x, height, width, color=BARS[system][1], hatch=hatch, edgecolor="white", lw=0)
        if system in NUMBERED:
            axes.text(x, 10, f"{height:.0f}", color="white", fontsize=9,
                      rotation=90, ha="center", va="bottom")  # fmt: skip
    half = max(len(shown), 3) * width / 2 + 0.03
    for system, (_, style) in LINES.items():
        if system in systems:
            axes.hlines(systems[system][direction], place - half, place + half, **style)


def handles_of(systems: set[str]) -> list:
    """Of the legend, for what is drawn."""
    bars = [
        plt.Rectangle((0, 0), 1, 1, color=color, label=label)
        for system, (label, color) in BARS.items()
        if system in systems
    ]
    lines = [
        plt.Line2D([], [], label=label, **style)
        for system, (label, style) in LINES.items()
        if system in systems
    ]
    return bars + lines


def plot_speeds(record: dict, anchors: dict, path: Path, graphs: dict | None = None) -> None:
    table, here = speeds(record, anchors, graphs), timed_here(record)
    replayed = peer_graphs(record, graphs)
    here |= {(shape, PEER) for shape in replayed}
    of_graphs = f", of {PEER} at {', '.join(replayed)} as CUDA graphs" if replayed else ""
    present = {system for systems in table.values() for system in systems}
    most = max(sum(system in BARS for system in systems) for systems in table.values())
    size = (max(12, 1.1 * len(table)), 9)
    figure, panels = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    for direction, (axes, title) in enumerate(zip(panels, ("forward", "backward"), strict=True)):
        for place, (shape, systems) in enumerate(table.items()):
            timed = {system for system in systems if (shape, system) in here}
            draw_group(axes, place, systems, direction, 0.9 / max(most, 3), timed)
        axes.set_ylabel(f"{title}, model TFLOP/s")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_xlim(-0.6, len(table) - 0.4)
    panels[1].set_xticks(range(len(table)), table, rotation=30, ha="right")
    handles = handles_of(present)
    figure.legend(
        handles=handles, loc="outside upper center", ncols=(len(handles) + 1) // 2, frameon=False
    )
    figure.supxlabel(
        f"{record['device']}, torch {record['versions']['torch']}, {record['date'][:10]}; wall"
        f" time.  * the better of wall and busy time{of_graphs}; hatched: {anchors['source']};"
        " no bar: not measured.",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    figure, (rates, memory) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
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
    if layer := newest(records, has_row("system", "sonicmoe")):
        graphs = read_records(arguments.results, "graphs-h?00-*.json")
        same_device = [record for record in graphs if record["device"] == layer["device"]]
        replayed = newest(same_device, has_row("system", PEER))
        plot_speeds(layer, load_anchors(), arguments.images / "bench-gpu.png", replayed)
    if cases := newest(records, has_row("case", "limit")):
        plot_limits(cases, arguments.images / "workspace-limit.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
