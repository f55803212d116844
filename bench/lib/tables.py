"""The newest records of bench/results as tables in Markdown, for the pages of PAGES.

`bench/plots.py --markdown` writes them between the pages' markers; a test holds the pages against
the records. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path

from bench.lib.record import REPOSITORY, RESULTS, newest, read_records
from bench.lib.summary import CEILING, PEER, by_place, load_anchors, measured_speed, ratios_by_shape

PAGES = [REPOSITORY / page for page in ("README.md", "docs/performance.md", "docs/lab/h100.md")]
FRONT = ("7B-n256", "7B-n1024", "30B-n256", "30B-n512")  # of README, out of its picture's shapes
TORCH, COMPILED, ATOMIC = "torch-grouped_mm", "torch-grouped_mm-compiled", "sonicmoe-atomic"
MARKED = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
SPEEDS = (  # title, system, prefix of the times
    ("ours, wall", "sonicmoe", ""),
    ("ours, busy", "sonicmoe", "busy_"),
    ("ours, graphs", "sonicmoe", "graph_"),
    ("ours, any order", ATOMIC, ""),
    ("official, wall", PEER, ""),
    ("official, busy", PEER, "busy_"),
    ("grouped_mm", TORCH, ""),
    ("compiled", COMPILED, ""),
    ("cuBLAS", CEILING, ""),
)


def of_device(name: str, key: str, value: str):
    """Whether a record of that GPU has a row whose `key` is `value`."""
    return lambda r: name in r.get("device", "") and any(row.get(key) == value for row in r["rows"])


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(line)} |" for line in [titles, *rows])
    return [head, "|---" * len(titles) + "|", *body]


def caption(record: dict) -> list[str]:
    where = record.get("device") or record["cpu"]
    if "threads" in record:
        where = f"{where.split(' w')[0].strip()}, {record['threads']} cores"
    commit, date, file = record["commit"][:7], record["date"][:10], record["file"]
    return [f"{where}, commit {commit}, {date}: `bench/results/{file}`.", ""]


def speed(row: dict, prefix: str = "") -> str:
    if f"{prefix}fwd_ms" not in row:
        return "–"
    forward, backward = measured_speed(row, prefix)
    return f"{forward:.0f}/{backward:.0f}"


def beside(rows: list[dict], key: str, scale: float = 1.0, digits: int = 0) -> str:
    """One value of several systems."""
    cells = (f"{scale * row[key]:.{digits}f}" if key in row else "–" for row in rows)
    return " / ".join(cells)


def layer_table(record: dict, transient: bool = True) -> list[str]:
    """The whole layer: speeds, memory and errors by shape; columns that nothing fills are left out,
    and without `transient` the most memory in use during backward."""
    rows = record["rows"]
    places, shapes = by_place(rows), list(dict.fromkeys(row["shape"] for row in rows))
    holders = ["sonicmoe", *([PEER] if any(row["system"] == PEER for row in rows) else []), TORCH]
    columns = [
        (title, [speed(places.get((shape, system), {}), prefix) for shape in shapes])
        for title, system, prefix in SPEEDS
    ]
    columns += [
        (title, [beside([places.get((s, h), {}) for h in who], *how) for s in shapes])
        for title, who, how in (
            ("kept", holders, ("kept_mib",)),
            ("most in backward", holders, ("peak_bwd_mib",)),
            ("error", ["sonicmoe", TORCH], ("rel_err", 1e3, 1)),
        )
    ]
    columns = [
        (title, cells)
        for title, cells in columns
        if set(cells) != {"–"} and (transient or title != "most in backward")
    ]
    titles = ["shape", *(title for title, _ in columns)]
    lines = zip(shapes, *(cells for _, cells in columns), strict=True)
    return caption(record) + table(titles, [list(line) for line in lines])


def whole_speed(row: dict, prefix: str = "") -> str:
    """Forward and backward together."""
    forward, backward = measured_speed(row, prefix)
    return f"{3 / (1 / forward + 2 / backward):.0f}"


def front_table(record: dict) -> list[str]:
    """Few shapes and few figures, for README."""
    places = by_place(record["rows"])
    lines = []
    for shape in FRONT:
        ours, peer, torch = (places[shape, system] for system in ("sonicmoe", PEER, COMPILED))
        kept = beside([ours, places[shape, TORCH]], "kept_mib")
        both = [f"{whole_speed(row)} ({whole_speed(row, 'busy_')})" for row in (ours, peer)]
        lines.append([shape, *both, whole_speed(torch), f"{kept} MiB"])
    titles = ["shape", "sonicmoe", "official `sonic-moe`", "grouped_mm, compiled"]
    return table([*titles, "kept for backward, sonicmoe / torch"], lines)


def graphs_table(record: dict) -> list[str]:
    """Both systems as CUDA graphs, with the ratios of their times."""
    rows = record["rows"]
    places, ratios = by_place(rows), ratios_by_shape(rows, load_anchors())
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        ours, theirs = places[shape, "sonicmoe"], places[shape, PEER]
        forward, backward, both = ratios[shape]["sonicmoe"]["graph"]
        lines.append([shape, speed(ours), speed(ours, "graph_"), speed(theirs),
                      speed(theirs, "busy_"), speed(theirs, "graph_"),
                      f"{forward:.3f}", f"{backward:.3f}", f"**{both:.3f}**"])  # fmt: skip
    titles = ["shape", "ours, wall", "ours, graphs", "official, wall", "official, busy"]
    titles += ["official, graphs", "forward", "backward", "both"]
    return caption(record) + table(titles, lines)


def cpu_table(record: dict) -> list[str]:
    """GFLOP/s beside torch's, a line per shape."""

    def speeds(row: dict, system: str) -> str:
        return f"{row[system]['forward_gflops']:.0f}/{row[system]['backward_gflops']:.0f}"

    rows, lines = record["rows"], {}
    for row in rows:
        line = lines.setdefault(tuple(row["shape"]), [", ".join(map(str, row["shape"]))])
        line += [
            speeds(row, "sonicmoe_cpp"),
            speeds(row, "torch_grouped_mm"),
            f"{row['ratio']:.2f}",
        ]
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    titles = ["T, d, n, E, K"] + [f"{d}{t}" for d in dtypes for t in ("", ", torch", ", ratio")]
    return caption(record) + table(titles, list(lines.values()))


def cases_table(record: dict) -> list[str]:
    """Times relative to the plain case of the same shape: a line per kind and shape."""
    lines: dict[str, list[str]] = {}
    plain = {}
    for row in record["rows"]:
        shape = row["shape"]
        if row["case"] == "limit" and row["limit_mib"] and "ratio" in row:
            cell = f"{row['limit_mib']:.0f} MiB: {row['ratio']:.3f}"
            lines.setdefault(f"`workspace_limit`, {shape}", []).append(cell)
        elif row["case"] == "skew" and row["skew"] in ("zipf", "hot-expert"):
            cell = f"{row['skew']}: {row['cost']:.3f}"
            lines.setdefault(f"uneven routing, {shape}", []).append(cell)
        elif row["case"] == "rounding":
            time = row["fwd_ms"] + row["bwd_ms"]
            if row["router"] == "topk":
                plain[shape] = time
                continue
            where = f"token rounding, d = {row['d']}, n = {row['n']}, K = {row['K']}"
            lines.setdefault(where, []).append(f"E = {row['E']}: {time / plain[shape]:.3f}")
    return caption(record) + table(
        ["case", "time, relative"], [[case, ", ".join(cells)] for case, cells in lines.items()]
    )


def tables(results: Path = RESULTS) -> dict[str, list[str]]:
    """By the names that the page's markers use."""
    records = read_records(results)
    layers = [r for r in records if r["file"].startswith("h")]
    graphs = [r for r in records if r["file"].startswith("graphs-")]
    cpu = [r for r in records if r["file"].startswith("cpu-")]
    h200 = newest(layers, of_device("H200", "system", "sonicmoe"))
    return {
        "front": front_table(h200),
        "h200": layer_table(h200),
        "h200-graphs": graphs_table(newest(graphs, of_device("H200", "system", PEER))),
        "h200-cases": cases_table(newest(layers, of_device("H200", "case", "limit"))),
        "h100": layer_table(
            newest(layers, of_device("H100", "system", "sonicmoe")), transient=False
        ),
        "cpu": cpu_table(newest(cpu, lambda r: True)),
    }


def with_tables(page: str, tables: dict[str, list[str]]) -> str:
    """The page with every marked table replaced."""
    return MARKED.sub(lambda m: m[1] + "\n".join(tables[m[2]]) + "\n" + m[3], page)
