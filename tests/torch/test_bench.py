"""What the GPU benchmarks compute without a GPU: routings of chosen skew, padding, kernels' parts,
profiles split into forward and backward, medians, ratios to other records, pictures."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from bench import cases, compare_builds, layer, systems
from bench.lib import compilation, problem, profile, routings, summary, timing
from bench.lib.profile import Halves, Span
from bench.lib.record import has_row, newest, rounded
from bench.systems import official
from bench.systems.sonicmoe import SonicMoE

T, E, K = 2048, 64, 6


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("draw", cases.SKEWS.values(), ids=cases.SKEWS)
def test_a_token_takes_distinct_experts_that_exist(draw, generator):
    ids = draw(T, E, K, generator)
    assert ids.shape == (T, K) and ids.dtype == torch.int32
    assert ids.min() >= 0 and ids.max() < E
    ordered = ids.sort(-1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()


def test_balanced_rows_are_equal_and_tokens_differ(generator):
    ids = routings.balanced_ids(T, E, K, generator)
    assert (routings.rows_per_expert(ids, E) == T * K // E).all()
    assert len(ids.sort(-1).values.unique(dim=0)) > T * 9 // 10


def test_balanced_wants_whole_blocks_of_tokens(generator):
    with pytest.raises(ValueError, match="2050 tokens"):
        routings.balanced_ids(T + 2, E, K, generator)


def test_uniform_rows_stay_near_the_mean(generator):
    rows = routings.rows_per_expert(routings.uniform_ids(T, E, K, generator), E)
    assert (rows - T * K / E).abs().max() < 6 * (T * K / E) ** 0.5
    assert rows.unique().numel() > 1


def test_zipf_rows_fall_with_the_expert(generator):
    rows = routings.rows_per_expert(routings.zipf_ids(T, E, K, generator), E).float()
    of_eight = rows.view(8, 8).sum(1)
    assert (of_eight[:-1] > of_eight[1:]).all()


def test_zipf_odds_of_one_draw(generator):
    """With K = 1 the rows are the odds 1 / (e + 1): expert 0 has four times those of expert 3."""
    rows = routings.rows_per_expert(routings.zipf_ids(200_000, E, 1, generator), E)
    odds = 1 / torch.arange(1, E + 1)
    expected = 200_000 * odds / odds.sum()
    assert ((rows - expected).abs() < 6 * expected.sqrt()).all()


def test_every_token_takes_the_hot_expert(generator):
    rows = routings.rows_per_expert(routings.hot_expert_ids(T, E, K, generator), E)
    assert rows[0] == T and rows[1:].max() < T // 4


def test_shuffling_renames_experts(generator):
    ids = routings.zipf_ids(T, E, K, generator)
    renamed = routings.shuffled(ids, E, generator)
    before, after = (routings.rows_per_expert(i, E) for i in (ids, renamed))
    assert (before.sort().values == after.sort().values).all() and (before != after).any()


def test_padded_rows():
    rows = torch.tensor([0, 1, 64, 65], dtype=torch.int32)
    assert routings.padded_rows(rows, 64) == 0 + 64 + 64 + 128
    assert routings.padded_rows(rows, 128) == 0 + 128 + 128 + 128


def test_the_cost_of_skew_is_time_beside_padded_rows():
    times = {
        ("balanced", "forward"): 1.0,
        ("balanced", "both"): 3.0,
        ("zipf", "forward"): 3.0,
        ("zipf", "both"): 8.0,
    }
    rows = {"balanced": torch.tensor([64, 64]), "zipf": torch.tensor([127, 1])}
    figures = cases.skew_figures(times, rows, "zipf")
    assert figures["padded_ratio"] == 1.5
    assert figures["cost_fwd"] == pytest.approx(2.0)
    assert figures["cost_bwd"] == pytest.approx(5 / 3)
    assert figures["cost"] == pytest.approx(16 / 9) and not figures["met"]
    assert cases.skew_figures(times, rows, "balanced")["met"]


def test_overhead_leaves_the_products_out():
    kernels = cases.by_kernel(
        {
            "void sonicmoe::cuda::(anonymous namespace)::route_kernel<float>(Params)": 2.0,
            "sonicmoe::cuda::count_experts(PairSource, long, int*)": 1.0,
            "void sonicmoe::cuda::grouped_gemm_kernel<Up<add_kernel_tag> >(Params)": 6.0,
            "Memset (Device)": 0.5,
            "at::native::vectorized_elementwise_kernel": 0.5,
        }
    )
    figures = cases.overhead(kernels)
    assert figures["overhead_us"] == 3.5 and figures["layer_us"] == 10.0
    assert figures["share"] == pytest.approx(0.35)
    assert figures["routing_us"] == 2.0 and figures["other_us"] == 0.5
    assert "unknown" not in figures


def test_a_kernel_that_no_part_knows_is_named():
    name = "void sonicmoe::cuda::brand_new_kernel<4>(Params)"
    figures = cases.overhead(cases.by_kernel({name: 2.0, "void a::route_kernel<4>(R)": 1.0}))
    assert figures["unknown"] == [name]
    assert figures["routing_us"] == 1.0 and figures["other_us"] == 2.0


def test_arguments():
    assert cases.parse_arguments([]).case is None
    assert cases.parse_arguments(["--case", "skew", "--case", "limit"]).case == ["skew", "limit"]
    with pytest.raises(SystemExit):
        cases.parse_arguments(["--case", "other"])


# ----------------------------------------------------------------------------------------- profiles

MARK = "at::cuda::(anonymous namespace)::spin_kernel(long)"


def spans(*items: tuple[str, float, float]) -> list[Span]:
    return [Span(*item) for item in items]


def test_marks_split_a_profile_into_forward_and_backward_of_each_call():
    recorded = spans(
        ("before", 0, 1),
        (MARK, 1, 2), ("up", 2, 5), ("down", 5, 6),
        (MARK, 6, 7), ("dH", 7, 9),
        (MARK, 9, 10), ("up", 10, 12),
        (MARK, 12, 13), ("dH", 13, 17), ("dW", 17, 18),
    )  # fmt: skip
    first, second = profile.halves_of(recorded, 2)
    assert first == Halves(recorded[2:4], recorded[5:6])
    assert second == Halves(recorded[7:8], recorded[9:])
    with pytest.raises(RuntimeError, match="3 calls: 4 marks, not 6"):
        profile.halves_of(recorded, 3)


def test_busy_time_is_the_union_of_intervals():
    """b begins within a, c lies within b, d comes after a pause: 10 + 5 + 0 + 2."""
    overlapping = spans(("a", 0, 10), ("b", 4, 15), ("c", 6, 8), ("d", 20, 22))
    assert profile.busy_by_name(overlapping) == {"a": 10, "b": 5, "c": 0, "d": 2}
    assert profile.busy_ms(overlapping) == pytest.approx(0.017)


def test_busy_figures_are_of_the_median_call():
    """One slow call out of three leaves them alone."""
    calls = [
        Halves(spans(("f", 0, 1000 * forward)), spans(("b", 0, 1000 * backward)))
        for forward, backward in ((1, 4), (9, 3), (2, 50))
    ]
    assert profile.busy_figures(calls) == {"busy_fwd_ms": 2, "busy_bwd_ms": 4}


def test_a_profile_counts_its_last_calls_only(monkeypatch):
    log: list[Span] = []

    def launch(name: str) -> None:
        log.append(Span(name, len(log), len(log) + 1))

    def device_spans(run):
        run()
        return log

    monkeypatch.setattr(profile, "mark", lambda: launch(MARK))
    monkeypatch.setattr(profile, "device_spans", device_spans)
    monkeypatch.setattr(profile, "rest", lambda pace: launch("rest"))
    pace = timing.Pace(seconds=0.08, settle=0.1, rest=0.5)
    calls = profile.profiled_halves(lambda: launch("f"), lambda y: launch("b"), 20.0, pace)
    assert log.pop(0).name == "rest"
    assert len(log) == 4 * (5 + 4) and len(calls) == 4
    assert all((f.name, b.name) == ("f", "b") for (f,), (b,) in calls)
    assert calls[-1].backward == log[-1:]


def test_kernel_table():
    calls = [spans(("a", 0, 3), ("b", 3, 8), ("a", 8, 9)), spans(("b", 0, 7), ("a", 7, 8))]
    assert profile.kernel_table(calls) == [(6.0, 1.0, "b"), (2.5, 1.5, "a")]


# --------------------------------------------------------------------------------------------- runs


def test_forward_and_backward_are_timed_apart(monkeypatch):
    now, log = [0.0], []

    def work(name, ms):
        log.append(name)
        now[0] += ms
        return name

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "warm_seconds", lambda call, seconds: 0.01)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: log.append(seconds))
    pace = timing.Pace(seconds=0.1, settle=0.03, rest=0.5)

    def backward(result):
        assert result == "f"
        work("b", 50.0 if len(log) == 20 else 5.0)  # one outlier

    assert timing.halves_ms(lambda: work("f", 2.0), backward, pace) == (2.0, 5.0)
    assert log == [0.5] + ["f", "b"] * (3 + 10)


def test_medians_of_runs():
    runs = [
        {"fwd_ms": 3.0, "bwd_ms": 5.0},
        {"fwd_ms": 1.0, "bwd_ms": 9.0},
        {"fwd_ms": 2.0, "bwd_ms": 4.0},
    ]
    assert layer.median_of_runs(runs) == {
        "fwd_ms": 2.0,
        "bwd_ms": 5.0,
        "spread": {"fwd_ms": [1.0, 3.0], "bwd_ms": [4.0, 9.0]},
    }
    assert layer.median_of_runs(runs[:1]) == runs[0]
    assert layer.median_of_runs([]) == {}


class FakeSystem:
    def __init__(self, name: str) -> None:
        self.name = name


def test_systems_take_turns_and_one_that_fails_stops(monkeypatch):
    turns = []

    def figures_of_run(p, system, seconds):
        turns.append(system.name)
        if system.name == "big" and turns.count("big") == 2:
            raise torch.cuda.OutOfMemoryError
        return {"fwd_ms": float(len(turns)), "bwd_ms": 8.0}

    monkeypatch.setattr(layer, "figures_once", lambda *_: {"first_call_s": 0.123456})
    monkeypatch.setattr(layer, "figures_of_run", figures_of_run)
    p = problem.Problem("tiny", (4, 8, 8, 2, 1), "cpu")
    arguments = layer.parse_arguments(["--runs", "3", "--no-check"])
    rows = layer.bench_problem(p, [FakeSystem("small"), FakeSystem("big")], arguments)
    assert turns == ["small", "big"] * 2 + ["small"]
    small, big = rows
    assert small["fwd_ms"] == 3.0 and small["spread"]["fwd_ms"] == [1.0, 5.0]
    assert small["first_call_s"] == 0.1235 and small["system"] == "small" and small["T"] == 4
    assert big["out_of_memory"] and big["fwd_ms"] == 2.0


def test_a_system_of_unknown_options_is_left_out(monkeypatch, capsys):
    unknown = SonicMoE("new", no_such_option=1)
    monkeypatch.setitem(systems.SYSTEMS, "new", lambda: unknown)
    found = systems.systems_named(["sonicmoe", "new"])
    assert [system.name for system in found] == ["sonicmoe"]
    assert "new: skipped, sonicmoe_cpp does not know no_such_option" in capsys.readouterr().out


def test_the_official_layer_is_left_out_where_it_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(official.importlib.util, "find_spec", lambda name: None)
    assert systems.systems_named(["sonic-moe"]) == []
    assert "sonic-moe: skipped, the package" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ compile


def test_compilations_start_as_memory_allows():
    start = compilation.next_to_start
    assert start([70, 20, 8], [], workers=6, memory=75) == 0
    assert start([20, 8, 4], [70], workers=6, memory=75) == 2
    assert start([20, 8], [70], workers=6, memory=75) is None
    assert start([4], [1, 1], workers=2, memory=75) is None
    assert start([90], [], workers=6, memory=75) == 0
    assert start([], [], workers=6, memory=75) is None


def test_a_compilation_may_need_more_than_the_tensors_it_holds():
    tokens, d, n, experts, top_k = shape = (32768, 4096, 256, 256, 16)
    held = 2 * (2 * 3 * experts * n * d + 2 * tokens * top_k * (d + n))
    assert held < compilation.needed_bytes(shape) < 4 * held


def test_compilations_end_each_in_its_own_way():
    endings = {"a": "pass", "b": "raise SystemExit(3)", "c": "import time; time.sleep(60)"}
    entries = [{"name": name, "shape": [64, 8, 8, 2, 1]} for name in endings]
    outcomes = compilation.compile_all(
        entries,
        workers=2,
        limit=1.5,
        memory=8 * problem.GIB,
        command=lambda entry: [sys.executable, "-S", "-c", endings[entry["name"]]],
    )
    assert outcomes == {"a": "done", "b": "failed (exit 3)", "c": "stopped after 2 s"}


# ----------------------------------------------------------------------------- summary and pictures


def test_ratios_by_hand():
    """Ours takes 2 + 4, cuBLAS here 1 + 2; the peer 3 + 3 where cuBLAS takes 2 + 1 (times of
    speeds 1/f, 2/b): forward (3/2) / 2, backward (3/1) / 2, both (6/3) / 2."""
    ours, cublas, peer, peer_cublas = (1 / 2, 2 / 4), (1, 1), (1 / 3, 2 / 3), (1 / 2, 2)
    ratios = summary.scaled_ratios(ours, cublas, peer, peer_cublas)
    assert ratios == pytest.approx([0.75, 1.5, 1.0])
    assert summary.best_speed({"wall": [100, 700], "busy": [400, 400]}) == (400, 400)
    measured = layer_row("a", "sonic-moe", 9.0, 9.0, busy_fwd_ms=0.5, busy_bwd_ms=4.0)
    assert summary.best_speed(measured) == pytest.approx((2, 0.5))


def layer_row(shape: str, system: str, fwd_ms: float, bwd_ms: float, **more) -> dict:
    """1e9 FLOPs forward: model TFLOP/s are 1 / fwd_ms and 2 / bwd_ms."""
    sizes = {"T": 10**9 // 6, "d": 1, "n": 1, "E": 1, "K": 1}
    return sizes | {"shape": shape, "system": system, "fwd_ms": fwd_ms, "bwd_ms": bwd_ms} | more


ANCHORS = {
    "source": "elsewhere",
    "rows": [
        *({"shape": s, "system": "cublas-bmm", "wall": [1, 1]} for s in "abc"),
        *({"shape": s, "system": "sonic-moe", "wall": [0.1, 9], "busy": [0.5, 0.5]} for s in "abc"),
        {"shape": "d", "system": "paper", "published": [0.25, 0.25]},
    ],
}


def test_summary_has_the_ratios_and_their_geometric_mean():
    """The peer takes twice cuBLAS's time. cuBLAS here takes 1 + 2 ms, ours at `a` as much by busy
    time and 1.6 times as much by wall time: 2 and 1.25. At `b` twice that: 1 and 0.625."""
    rows = [
        *(layer_row(s, "cublas-bmm", 1, 2) for s in "abcd"),
        layer_row("a", "sonicmoe", 1.6, 3.2, busy_fwd_ms=1, busy_bwd_ms=2),
        layer_row("b", "sonicmoe", 3.2, 6.4, busy_fwd_ms=2, busy_bwd_ms=4),
        layer_row("d", "sonicmoe", 1, 2, busy_fwd_ms=1, busy_bwd_ms=2),
        {"shape": "c", "system": "sonicmoe", "out_of_memory": True},
        layer_row("a", "torch-grouped_mm", 9, 9),
    ]
    summed = summary.summary(rows, ANCHORS, ["a", "b", "c", "d"])
    assert set(summed["shapes"]) == {"a", "b"} and set(summed["shapes"]["a"]) == {"sonicmoe"}
    assert summed["shapes"]["a"]["sonicmoe"]["busy"] == pytest.approx([2, 2, 2])
    assert summed["shapes"]["b"]["sonicmoe"]["wall"] == pytest.approx([0.625] * 3)
    mean = summed["geometric_means"]["sonicmoe"]
    assert set(mean) == {"busy", "wall"} and mean["busy"]["shapes"] == mean["wall"]["shapes"] == 2
    assert mean["busy"]["ratios"] == pytest.approx([2**0.5] * 3)
    assert mean["wall"]["ratios"] == pytest.approx([(1.25 * 0.625) ** 0.5] * 3)
    text = summary.describe(rounded(summed))
    assert re.search(r"^b +sonicmoe +busy 1\.000  1\.000  1\.000  wall 0\.625", text, re.M)
    assert re.search(r"^mean of 2 +sonicmoe +busy 1\.414", text, re.M)


def test_a_peer_of_the_same_run_counts_before_the_anchors():
    """3 + 9 ms by its busy time to our 2 + 4, whatever cuBLAS takes; at `b` it failed."""
    rows = [
        *(layer_row(s, "cublas-bmm", 1, 2) for s in "ab"),
        *(layer_row(s, "sonicmoe", 2, 4) for s in "ab"),
        layer_row("a", "sonic-moe", 30, 90, busy_fwd_ms=3, busy_bwd_ms=9),
        {"shape": "b", "system": "sonic-moe", "out_of_memory": True},
    ]
    table = summary.ratios_by_shape(rows, ANCHORS)
    assert table["a"]["sonicmoe"]["wall"] == pytest.approx([1.5, 2.25, 2])
    assert table["b"]["sonicmoe"]["wall"] == pytest.approx([1, 1, 1])


def test_graphs_stand_beside_graphs():
    """At `a` the peer's take 3 + 9 ms to our 2 + 4, at `b` it was not replayed."""
    rows = [
        *(layer_row(s, "cublas-bmm", 1, 2) for s in "ab"),
        *(layer_row(s, "sonicmoe", 8, 8, graph_fwd_ms=2, graph_bwd_ms=4) for s in "ab"),
        layer_row("a", "sonic-moe", 8, 8, graph_fwd_ms=3, graph_bwd_ms=9),
        layer_row("b", "sonic-moe", 8, 8),
    ]
    summed = summary.summary(rows, ANCHORS, ["a", "b"])
    assert summed["shapes"]["a"]["sonicmoe"]["graph"] == pytest.approx([1.5, 2.25, 2])
    assert set(summed["shapes"]["b"]["sonicmoe"]) == {"wall"}
    mean = summed["geometric_means"]["sonicmoe"]
    assert (mean["wall"]["shapes"], mean["graph"]["shapes"]) == (2, 1)
    text = summary.describe(summed)
    assert re.search(r"^mean of 1 +sonicmoe +graph 1\.500  2\.250  2\.000$", text, re.M)


def test_a_problem_is_found_by_its_name_alone():
    suites = json.loads((REPOSITORY / "bench" / "problems.json").read_text())["suites"]
    names = [entry["name"] for suite in suites.values() for entry in suite["problems"]]
    assert len(set(names)) == len(names)
    known = compare_builds.known_problems()
    assert set(names) - set(known) == {entry["name"] for entry in suites["cpu"]["problems"]}


def test_anchors_name_shapes_of_the_problems_and_hold_pairs():
    problems = json.loads((REPOSITORY / "bench" / "problems.json").read_text())["suites"]
    names = {entry["name"] for suite in problems.values() for entry in suite["problems"]}
    rows = summary.load_anchors()["rows"]
    assert len({(row["shape"], row["system"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["shape"] in names
        assert all(100 < speed < 800 for speed in summary.best_speed(row))


def test_bars_are_of_one_record_and_of_the_anchors_where_it_has_none():
    pytest.importorskip("matplotlib")
    from bench.lib import speed_bars

    row = {"T": 1000, "d": 10, "n": 10, "E": 4, "K": 1, "fwd_ms": 1.0, "bwd_ms": 4.0}
    old, new = (
        {"date": date, "rows": [row | {"shape": "a", "system": "sonicmoe"}]} for date in "12"
    )
    undated = {"rows": [{}]}
    assert newest([new, undated, old], has_row("system", "sonicmoe")) is new
    assert newest([new, undated], has_row("case", "limit")) is None
    new["rows"] += [
        row | {"shape": "a", "system": "peer", "busy_fwd_ms": 0.5, "busy_bwd_ms": 2.0},
        row | {"shape": "c", "system": "peer"},
    ]
    bars = speed_bars.bars_of_record(new, ("a",))
    assert bars == {
        "a": {
            "sonicmoe": (pytest.approx((6e-4, 3e-4)), None),
            "peer": (pytest.approx((6e-4, 3e-4)), pytest.approx((12e-4, 6e-4))),
        }
    }
    assert bars["a"]["peer"].top(1) == pytest.approx(6e-4)
    anchors = {
        "rows": [
            {"shape": "a", "system": "peer", "wall": [100, 700]},
            {"shape": "a", "system": "other", "wall": [100, 700], "busy": [400, 400]},
            {"shape": "a", "system": "paper", "published": [1, 1]},
            {"shape": "c", "system": "other", "wall": [1, 1]},
        ]
    }
    both = speed_bars.with_anchors(bars, anchors)
    assert set(both) == {"a"} and set(both["a"]) == {"sonicmoe", "peer", "other"}
    assert both["a"]["peer"].wall == pytest.approx((6e-4, 3e-4))
    assert both["a"]["other"] == ((100, 700), (400, 400))


def picture_figures(picture):
    """What the newest record of that GPU gives for the picture."""
    from bench.lib import speed_bars, tables
    from bench.lib.record import read_records

    record = newest(
        read_records(pattern="h?00-*.json"), tables.of_device(picture.gpu, "system", "sonicmoe")
    )
    bars = speed_bars.bars_of_record(record, picture.shapes)
    anchors = summary.load_anchors()
    return record, speed_bars.with_anchors(bars, anchors) if picture.anchored else bars


def test_a_picture_shows_one_kind_of_gpu_and_the_official_layer_everywhere(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.lib import speed_bars

    anchors = summary.load_anchors()
    for picture in speed_bars.PICTURES:
        assert len(picture.shapes) <= 6
        record, bars = picture_figures(picture)
        assert picture.gpu in record["device"]
        assert not picture.anchored or picture.gpu in anchors["device"]
        for layers in bars.values():
            assert {"sonicmoe", summary.PEER, summary.CEILING} <= set(layers)
        speed_bars.draw(record, picture, anchors, tmp_path / picture.file)
        assert (tmp_path / picture.file).stat().st_size > 10_000


def test_the_pictures_show_where_the_official_layer_is_ahead():
    pytest.importorskip("matplotlib")
    from bench.lib import speed_bars

    ahead = {
        shape
        for picture in speed_bars.PICTURES
        for shape, systems in picture_figures(picture)[1].items()
        if systems[summary.PEER].top(0) > systems["sonicmoe"].top(0)
    }
    assert ahead >= {"30B-n1024", "OLMoE"}


# ----------------------------------------------------------------------------------- compare_builds


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (
            "void a::grouped_gemm_kernel<a::HiddenGradientSpec<256, (a::Major)1, true, 2> >(P)",
            "HiddenGradient<256, 1, true, 2>",
        ),
        ("void a::k<a::(anonymous namespace)::LogitsSpec<128, true> >(P)", "Logits<128, true>"),
        (
            "a::(anonymous namespace)::aggregate_kernel(a::(anonymous namespace)::S)",
            "aggregate_kernel",
        ),
        ("void a::(anonymous namespace)::route_kernel<4, int>(a::R)", "route_kernel"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_short_names_of_kernels(kernel, name):
    assert compare_builds.short_name(kernel) == name


def test_builds_take_turns():
    assert compare_builds.turns(["a", "b", "c"], 3) == list("abccbaabc")


def test_power_is_that_of_the_settled_time():
    assert compare_builds.parse_reading("[N/A], 1980") is None
    assert compare_builds.parse_reading("690.5, 1395\n") == (690.5, 1395.0)
    readings = [(0.0, 100.0, 1980.0), (1.0, 600.0, 1400.0), (2.0, 700.0, 1300.0)]
    assert compare_builds.mean_between(readings, 0.5, 2.5) == {"watts": 650.0, "mhz": 1350.0}
    assert compare_builds.mean_between(readings, 3.0, 4.0) == {}


def test_table_of_builds():
    old = {"kernels": {"up": 90.0, "tiny": 0.1}, "watts": 700.0, "ms": 0.1}
    new = {"kernels": {"up": 80.0, "fresh": 10.0}, "watts": 600.0, "ms": 0.09}
    rows = {"old": [old, old | {"kernels": {"up": 110.0}}], "new": [new] * 2}
    lines = {line.split("  ")[1]: line.split() for line in compare_builds.table("p", rows)[1:]}
    assert lines["up"][1:] == ["100.0", "1.000", "80.0", "0.800"]
    assert lines["fresh"][1:] == ["-", "10.0"] and "tiny" not in lines
    assert lines["call, us"][-2:] == ["90.0", "0.900"]
    assert lines["J per call"][-4:] == ["0.070", "1.000", "0.054", "0.771"]


def test_the_problems_of_a_comparison_exist():
    assert {"7B-n256", "OLMoE"} <= set(compare_builds.known_problems())
