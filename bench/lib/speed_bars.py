"""The layer's speed as bars: one kind of GPU to a picture, six shapes, forward above backward.

A bar is wall time of eager calls. The pale part above it is the speed while the GPU is busy: what a
system that is bound by its launches would reach without them. Needs neither torch nor a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib

from bench.lib.summary import CEILING, PEER, Speed, measured_speed

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke

HALO = withStroke(linewidth=2.5, foreground="white")

BARS = {  # system: label, colour
    "sonicmoe": ("sonicmoe", "tab:blue"),
    PEER: ("official sonic-moe", "tab:orange"),
    "torch-grouped_mm-compiled": ("torch grouped_mm, compiled", "dimgray"),
    "MoMoE": ("MoMoE", "tab:purple"),
    "ScatterMoE": ("ScatterMoE", "tab:green"),
}
LINES = {  # across a shape's bars: label, style
    CEILING: ("cuBLAS, the products alone", {"color": "black", "lw": 1.5}),
}


class Picture(NamedTuple):
    file: str
    gpu: str  # part of the record's device
    shapes: tuple[str, ...]
    anchored: bool = False  # with the systems of anchors.json, which an H100 timed in another run


PICTURES = (
    Picture(
        "bench-h200.png",
        "H200",
        ("1.4B-n256", "1.4B-n1024", "7B-n256", "7B-n1024", "30B-n256", "30B-n512"),
    ),
    Picture(
        "bench-h100.png",
        "H100",
        ("7B-n256", "30B-n256", "30B-n1024", "120B-n2048", "OLMoE", "Qwen3-Next"),
        anchored=True,
    ),
)


class Bar(NamedTuple):
    wall: Speed
    busy: Speed | None = None

    def top(self, direction: int) -> float:
        return max(self.wall[direction], self.busy[direction] if self.busy else 0.0)


Table = dict[str, dict[str, Bar]]  # by shape and system


def bars_of_record(record: dict, shapes: tuple[str, ...]) -> Table:
    table: Table = {shape: {} for shape in shapes}
    for row in record["rows"]:
        if row["shape"] in table and "fwd_ms" in row:
            busy = measured_speed(row, "busy_") if "busy_fwd_ms" in row else None
            table[row["shape"]][row["system"]] = Bar(measured_speed(row), busy)
    return table


def with_anchors(table: Table, anchors: dict) -> Table:
    """What the record did not time, from anchors.json; figures that were only printed stay out."""
    for row in anchors["rows"]:
        if row["shape"] in table and "wall" in row:
            busy = tuple(row["busy"]) if "busy" in row else None
            table[row["shape"]].setdefault(row["system"], Bar(tuple(row["wall"]), busy))
    return table


def sizes(record: dict, shape: str) -> str:
    row = next(row for row in record["rows"] if row["shape"] == shape)
    widths = f"{row['T']} tokens\n{row['d']} x {row['n']}"
    return f"{shape}\n{widths}\n{row['E']} experts, top-{row['K']}"


def draw_shape(axes, place: int, systems: dict[str, Bar], direction: int, width: float) -> None:
    shown = [system for system in BARS if system in systems]
    for i, system in enumerate(shown):
        x = place + (i - (len(shown) - 1) / 2) * width
        color, wall, top = (
            BARS[system][1],
            systems[system].wall[direction],
            systems[system].top(direction),
        )
        axes.bar(x, top, 0.94 * width, color=color, alpha=0.35, lw=0)
        axes.bar(x, wall, 0.94 * width, color=color, lw=0)
        text = {"fontsize": 8.5, "ha": "center", "zorder": 4}
        axes.text(x, top + 6, f"{top:.0f}", va="bottom", path_effects=[HALO], **text)
        if wall < 0.95 * top:
            axes.text(x, wall - 8, f"{wall:.0f}", va="top", color="white", **text)
    half = len(shown) * width / 2 + 0.04
    for system, (_, style) in LINES.items():
        if system in systems:
            axes.hlines(systems[system].wall[direction], place - half, place + half, **style)


def handles_of(systems: set[str]) -> list:
    """Of the legend, for what is drawn."""
    bars = [
        plt.Rectangle((0, 0), 1, 1, color=color, label=label)
        for system, (label, color) in BARS.items()
        if system in systems
    ]
    pale = plt.Rectangle(
        (0, 0), 1, 1, color="black", alpha=0.25, lw=0, label="the same, GPU time alone"
    )
    lines = [
        plt.Line2D([], [], label=label, **style)
        for system, (label, style) in LINES.items()
        if system in systems
    ]
    return [*bars, pale, *lines]


def caption(record: dict, picture: Picture, anchors: dict) -> str:
    text = f"{record['device']}, torch {record['versions']['torch'].split('+')[0]}, "
    text += f"{record['date'][:10]}: {record['file']}"
    return f"{text}; other layers {anchors['source']}" if picture.anchored else text


def draw(record: dict, picture: Picture, anchors: dict, path: Path) -> None:
    table = bars_of_record(record, picture.shapes)
    if picture.anchored:
        table = with_anchors(table, anchors)
    present = {system for systems in table.values() for system in systems}
    most = max(sum(system in BARS for system in systems) for systems in table.values())
    figure, panels = plt.subplots(2, 1, figsize=(8.5, 6.4), sharex=True, layout="constrained")
    for direction, (axes, title) in enumerate(zip(panels, ("forward", "backward"), strict=True)):
        for place, systems in enumerate(table.values()):
            draw_shape(axes, place, systems, direction, 0.88 / most)
        axes.set_ylabel(f"{title}, model TFLOP/s")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_xlim(-0.5, len(table) - 0.5)
        axes.set_ylim(0, 790)
    panels[1].set_xticks(range(len(table)), [sizes(record, shape) for shape in table], fontsize=8.5)
    figure.legend(handles=handles_of(present), loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel(caption(record, picture, anchors), fontsize=8.5)
    figure.savefig(path, dpi=200)
    plt.close(figure)
