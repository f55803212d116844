"""Ours beside the official layer: of the same run, else of anchors.json, timed in another one.

A ratio is the peer's time over ours, each in units of cuBLAS's time in its run (machines differ by
a few percent): above 1 ours is faster. Beside our wall and busy time stands the better of the
peer's two, by forward and backward together; beside our CUDA graphs the peer's, where it was
replayed too. Busy time flatters a system that leaves the GPU idle between its kernels: the pauses
let the clock rise. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable

from bench.lib.record import REPOSITORY

ANCHORS = REPOSITORY / "bench" / "anchors.json"
PEER, CEILING = "sonic-moe", "cublas-bmm"
OURS = ("sonicmoe", "sonicmoe-atomic")
KINDS = {"busy": "busy_", "wall": "", "graph": "graph_"}  # of our figures, the prefix of their keys
PARTS = ("forward", "backward", "both")

Speed = tuple[float, float]  # model TFLOP/s forward and backward


def load_anchors() -> dict:
    return json.loads(ANCHORS.read_text())


def measured_speed(row: dict, prefix: str = "") -> Speed:
    """Of a row of bench/layer.py."""
    flops = 6.0 * row["T"] * row["K"] * row["n"] * row["d"]
    return flops / row[f"{prefix}fwd_ms"] / 1e9, 2 * flops / row[f"{prefix}bwd_ms"] / 1e9


def best_speed(row: dict) -> Speed:
    """Of what a row of anchors.json or of bench/layer.py has, the pair that takes less time in
    all."""
    pairs = [tuple(row[kind]) for kind in ("wall", "busy", "published") if kind in row]
    pairs += [measured_speed(row, prefix) for prefix in ("busy_", "") if f"{prefix}fwd_ms" in row]
    return min(pairs, key=lambda pair: times(pair)[2])


def peer_speed(row: dict, kind: str) -> Speed | None:
    """What stands beside our figures of that kind."""
    if kind != "graph":
        return best_speed(row)
    return measured_speed(row, "graph_") if "graph_fwd_ms" in row else None


def times(speed: Speed) -> tuple[float, float, float]:
    """Of forward, backward and both, in units of the forward's FLOPs."""
    forward, backward = 1 / speed[0], 2 / speed[1]
    return forward, backward, forward + backward


def scaled_ratios(ours: Speed, our_cublas: Speed, peer: Speed, peer_cublas: Speed) -> list[float]:
    """By PARTS."""
    columns = zip(*map(times, (ours, our_cublas, peer, peer_cublas)), strict=True)
    return [
        (theirs / their_unit) / (mine / my_unit) for mine, my_unit, theirs, their_unit in columns
    ]


def by_place(rows: Iterable[dict]) -> dict[tuple[str, str], dict]:
    return {(row["shape"], row["system"]): row for row in rows}


def ratios_by_shape(
    rows: list[dict], anchors: dict
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """By shape, our system and kind; what either run did not measure is left out."""
    here, elsewhere = by_place(rows), by_place(anchors["rows"])
    table: dict[str, dict] = {}
    for (shape, system), row in here.items():
        there = here if "fwd_ms" in here.get((shape, PEER), {}) else elsewhere
        needed = (here.get((shape, CEILING)), there.get((shape, PEER)), there.get((shape, CEILING)))
        if system not in OURS or not all(needed) or "fwd_ms" not in needed[0]:
            continue
        ours_cublas, peer, peer_cublas = needed
        units = measured_speed(ours_cublas), best_speed(peer_cublas)
        kinds = {
            kind: scaled_ratios(measured_speed(row, prefix), units[0], theirs, units[1])
            for kind, prefix in KINDS.items()
            if f"{prefix}fwd_ms" in row and (theirs := peer_speed(peer, kind))
        }
        if kinds:
            table.setdefault(shape, {})[system] = kinds
    return table


def geometric_means(table: dict, shapes: Iterable[str]) -> dict[str, dict]:
    """By our system and kind: the number of those shapes that have ratios, and their mean."""
    means: dict[str, dict] = {}
    for system in OURS:
        found = [table[s][system] for s in shapes if system in table.get(s, {})]
        for kind in KINDS:
            if ratios := [kinds[kind] for kinds in found if kind in kinds]:
                mean = [statistics.geometric_mean(column) for column in zip(*ratios, strict=True)]
                means.setdefault(system, {})[kind] = {"shapes": len(ratios), "ratios": mean}
    return means


def summary(rows: list[dict], anchors: dict, shapes: list[str]) -> dict:
    """shapes: of the geometric mean, as far as the peer was measured there: in this run, if it was
    in this run anywhere."""
    table = ratios_by_shape(rows, anchors)
    timed = {row["shape"] for row in rows if row["system"] == PEER and "fwd_ms" in row}
    shapes = [shape for shape in shapes if shape in timed] or shapes
    return {
        "about": f"time of {PEER} over ours, each over {CEILING} of its run, by {', '.join(PARTS)};"
        f" {PEER}: the better of its wall and busy time, beside our graphs its graphs; "
        f"where this run lacks it {anchors['source']}",
        "geometric_means": geometric_means(table, shapes),
        "shapes": table,
    }


def describe(summed: dict) -> str:
    """A line for each shape and system, then the means."""

    def line(name: str, system: str, kinds: dict) -> str:
        cells = (
            f"  {kind} " + "  ".join(f"{ratio:.3f}" for ratio in kinds[kind])
            for kind in KINDS
            if kind in kinds
        )
        return f"{name:16}{system:18}" + "".join(cells)

    lines = [summed["about"]]
    for shape, systems in summed["shapes"].items():
        lines += [line(shape, system, kinds) for system, kinds in systems.items()]
    for system, kinds in summed["geometric_means"].items():
        for count in sorted({mean["shapes"] for mean in kinds.values()}):
            means = {k: mean["ratios"] for k, mean in kinds.items() if mean["shapes"] == count}
            lines.append(line(f"mean of {count}", system, means))
    return "\n".join(lines)
