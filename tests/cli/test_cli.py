"""Every subcommand of `sonicmoe`: output, JSON, determinism."""

import json
import math
import re

import pytest

SUBCOMMANDS = ("info", "check", "bench", "memory", "route")
POLICIES = ("nearest", "up", "down", "stochastic", "balanced", "nearest_score")
SMALL_BENCH = ("bench", "--shape", "32,16,8,4,2", "--repeats", 3, "--seconds", 1)


def parsed(result):
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("subcommand", ("", *SUBCOMMANDS))
def test_help_goes_to_stdout(sonicmoe, subcommand):
    result = sonicmoe(*filter(None, [subcommand]), "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--json" in result.stdout if subcommand else all(s in result.stdout for s in SUBCOMMANDS)


# ------------------------------------------------------------------------------------------ info


def test_info(sonicmoe):
    info = parsed(sonicmoe("info", "--json"))
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["version"])
    assert info["backends"][-1]["name"] == "reference" and info["backends"][-1]["available"]
    assert all(backend["reason"] for backend in info["backends"])
    assert info["devices"][0]["device"] == "cpu" and info["devices"][0]["memory_bytes"] > 0
    text = sonicmoe("info").stdout
    assert info["version"] in text and "reference" in text
    assert info["version"] in sonicmoe("--version").stdout


# ----------------------------------------------------------------------------------------- check


@pytest.fixture
def cuda(sonicmoe):
    devices = parsed(sonicmoe("info", "--json"))["devices"]
    if not any(device["device"] == "cuda:0" for device in devices):
        pytest.skip("no usable GPU")


@pytest.mark.parametrize("subcommand", ("check", "bench", "route"))
def test_a_gpu_that_is_not_there_gives_one_line_with_the_reason(sonicmoe, subcommand):
    info = parsed(sonicmoe("info", "--json"))
    (backend,) = (b for b in info["backends"] if b["name"] == "cuda")
    if backend["available"]:
        pytest.skip("there is a GPU")
    result = sonicmoe(subcommand, "--device", "cuda")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and backend["reason"] in result.stderr


@pytest.mark.usefixtures("cuda")
def test_a_backend_of_another_device_gives_one_line(sonicmoe):
    for backend in ("cpu", "reference"):
        result = sonicmoe("check", "--device", "cuda", "--backend", backend)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert "--backend: expected a backend for cuda:0" in result.stderr


@pytest.mark.usefixtures("cuda")
def test_check_passes_on_cuda(sonicmoe):
    report = parsed(sonicmoe("check", "--device", "cuda", "--cases", 10, "--json"))
    assert report["passed"], report["failures"]
    assert all(row["passed"] == 10 for row in report["operations"])


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("extra", [(), ("--layer",)])
def test_bench_on_cuda(sonicmoe, extra):
    shape = ("--shape", "4096,512,256,16,4", "--repeats", 3, "--seconds", 1)
    (row,) = parsed(sonicmoe("bench", "--device", "cuda", *shape, "--json", *extra))["rows"]
    assert row["dtype"] == "bfloat16" and "--device cuda" in row["command"]
    for direction in ("forward", "backward"):
        assert 0 < row[direction]["p10_ms"] <= row[direction]["median_ms"]
        assert 1 <= row[direction]["calls_per_sample"] <= 50


@pytest.mark.usefixtures("cuda")
def test_route_rounds_alike_on_both_devices(sonicmoe):
    arguments = (
        "route",
        "--tokens",
        2048,
        "--experts",
        16,
        "--json",
        "--policy",
        "nearest,up,down",
    )
    assert parsed(sonicmoe(*arguments, "--device", "cuda")) == parsed(sonicmoe(*arguments))


@pytest.mark.parametrize("arguments", [(), ("--seed", 7, "--threads", 1)])
def test_check_passes(sonicmoe, arguments):
    report = parsed(sonicmoe("check", "--cases", 10, "--json", *arguments))
    assert report["passed"] and report["failures"] == []
    assert len(report["operations"]) == 10
    assert all(row["passed"] == 10 and row["failed"] == 0 for row in report["operations"])


def test_check_of_the_reference_and_of_one_operation(sonicmoe):
    report = parsed(
        sonicmoe("check", "--backend", "reference", "--op", "moe", "--cases", 3, "--json")
    )
    assert report["operations"] == [{"operation": "moe", "passed": 3, "failed": 0}]
    assert "moe " in sonicmoe("check", "--op", "moe", "--cases", 1).stdout


# ----------------------------------------------------------------------------------------- bench


@pytest.mark.parametrize("extra", [(), ("--layer",), ("--dtype", "bfloat16")])
def test_bench_of_one_shape(sonicmoe, extra):
    (row,) = parsed(sonicmoe(*SMALL_BENCH, "--json", *extra))["rows"]
    pairs, width, experts = 32 * 2, 16, 4
    element = 2 if "bfloat16" in extra else 4
    kept_h = pairs * 2 * 8 * element
    kept_routing = 4 * (experts + 3 * pairs) + 8 * pairs  # metadata, ids and weights
    assert row["kept_bytes"] == kept_h + kept_routing
    assert row["peak_forward_bytes"] > row["kept_bytes"] + 32 * width * element
    flops = {"forward": 6 * pairs * 16 * 8, "backward": 12 * pairs * 16 * 8}
    for direction, work in flops.items():
        figures = row[direction]
        assert 0 < figures["p10_ms"] <= figures["median_ms"] <= figures["p90_ms"]
        assert figures["samples"] == 3
        expected = work / (figures["median_ms"] * 1e-3) / 1e9
        assert math.isclose(figures["model_gflops_per_s"], expected, rel_tol=1e-6)


def test_the_printed_command_repeats_the_row(sonicmoe):
    (row,) = parsed(sonicmoe(*SMALL_BENCH, "--layer", "--json"))["rows"]
    command = row["command"].split()
    assert command[0] == "sonicmoe" and "--layer" in command
    (again,) = parsed(sonicmoe(*command[1:], "--repeats", 3, "--json"))["rows"]
    assert (again["shape"], again["dtype"]) == (row["shape"], row["dtype"])
    assert again["kept_bytes"] == row["kept_bytes"]


@pytest.mark.parametrize(
    ("suite", "rows"), [("coarse", 6), ("cpu", 6), ("models", 6), ("paper", 12), ("small-batch", 4)]
)
def test_bench_suites_name_their_problems(sonicmoe, suite, rows):
    # More tokens than any test machine holds keep the big suites from running: they say so.
    arguments = (
        "--tokens",
        8,
        "--repeats",
        1,
        "--warmup",
        0,
        "--seconds",
        0.01,
        "--no-check",
    )
    if suite != "cpu":
        arguments = ("--tokens", 2**30)
    result = sonicmoe("bench", "--suite", suite, "--json", *arguments)
    assert result.returncode == (0 if suite == "cpu" else 1)
    assert ("nothing was timed" in result.stderr) == (suite != "cpu")
    report = json.loads(result.stdout)
    assert len(report["rows"]) == rows
    assert all(("skipped" in row) == (suite != "cpu") for row in report["rows"])


# ---------------------------------------------------------------------------------------- memory


def test_memory_of_a_known_shape(sonicmoe):
    report = parsed(sonicmoe("memory", "--shape", "1024,512,256,16,4", "--layers", 3, "--json"))
    pairs = 1024 * 4
    ours, scattermoe = report["sonicmoe"], report["scattermoe"]
    assert ours["kept_h_bytes"] == 2 * pairs * 2 * 256
    assert ours["kept_metadata_bytes"] <= 32 * pairs
    assert ours["kept_bytes_all_layers"] == 3 * ours["kept_bytes"]
    assert ours["transient_forward_bytes"] == 2 * pairs * (256 + 512)
    assert ours["transient_backward_bytes"] == 2 * pairs * (2 * 256 + 256)  # dH and A'
    assert scattermoe["kept_h_bytes"] == 2 * pairs * (2 * 256 + 256 + 512)
    assert ours["parameter_bytes"] == 2 * 2 * 16 * 3 * 256 * 512  # weight and gradient


def test_the_rest_of_a_model_is_added(sonicmoe):
    base = ("memory", "--shape", "1024,512,256,16,4", "--gpu", "8GiB", "--json")
    rest = ("--other-bytes", "1MiB", "--other-bytes-per-token", 3000)
    alone, both = (parsed(sonicmoe(*base, *more)) for more in ((), rest))
    for name in ("sonicmoe", "scattermoe"):
        assert both[name]["other_bytes"] == 2**20 + 3000 * 1024 and alone[name]["other_bytes"] == 0
        grown = both[name]["total_bytes_all_layers"] - alone[name]["total_bytes_all_layers"]
        assert grown == 2**20 + 3000 * 1024
        assert both[name]["tokens_that_fit"] < alone[name]["tokens_that_fit"]
    assert "the rest of the model" in sonicmoe("memory", *rest).stdout


def test_what_is_kept_does_not_grow_with_granularity(sonicmoe):
    shapes = ("1024,512,256,16,4", "1024,512,128,32,8")  # n halved, K doubled
    kept = [parsed(sonicmoe("memory", "--shape", s, "--json"))["sonicmoe"] for s in shapes]
    assert kept[0]["kept_h_bytes"] == kept[1]["kept_h_bytes"]


@pytest.mark.parametrize("gpu", ["h100", "h200", "b200", "l40s", "a100", "a100-40gb", "24GiB"])
def test_tokens_that_fit(sonicmoe, gpu):
    base = ("memory", "--layers", 4, "--gpu", gpu, "--json", "--shape")
    report = parsed(sonicmoe(*base, "1024,2048,1024,32,8"))
    tokens = report["sonicmoe"]["tokens_that_fit"]
    assert tokens > report["scattermoe"]["tokens_that_fit"] > 0
    for count, fits in ((tokens, True), (tokens + 1, False)):
        at = parsed(sonicmoe(*base, f"{count},2048,1024,32,8"))
        assert (at["sonicmoe"]["total_bytes_all_layers"] <= report["gpu_bytes"]) == fits
    assert "tokens that fit" in sonicmoe("memory", "--gpu", gpu).stdout


def test_memory_says_why_nothing_fits(sonicmoe):
    base = ("memory", "--shape", "1024,2048,1024,32,8", "--layers", 16, "--other-bytes", "2GiB")
    weights = 16 * 32 * 3 * 1024 * 2048 * 4 / 2**30  # with gradients in bfloat16
    small = parsed(sonicmoe(*base, "--gpu", "4GiB", "--json"))
    assert small["sonicmoe"]["tokens_that_fit"] == 0
    why = small["why_nothing_fits"]
    assert f"gradients and optimizer {weights:.1f} GiB" in why and "model 2.00 GiB" in why
    assert f"warning: {why}" in sonicmoe(*base, "--gpu", "4GiB").stdout
    assert "why_nothing_fits" not in parsed(sonicmoe(*base, "--gpu", "80GiB", "--json"))
    assert "warning" not in sonicmoe(*base, "--gpu", "80GiB").stdout


# ----------------------------------------------------------------------------------------- route


def route(sonicmoe, *arguments):
    return parsed(sonicmoe("route", "--json", *arguments))["outcomes"]


def test_route_shows_all_policies_for_both_tiles(sonicmoe):
    outcomes = route(sonicmoe, "--tokens", 2048, "--experts", 16, "--top-k", 4)
    assert [(o["policy"], o["tile"]) for o in outcomes] == [
        (policy, tile) for tile in (64, 128) for policy in POLICIES
    ]
    for o in outcomes:
        before, after = o["rows_per_expert_before"], o["rows_per_expert_after"]
        assert sum(before) == o["rows_before"] == 2048 * 4
        assert (
            sum(after) == o["rows_after"] == o["rows_before"] - o["rows_dropped"] + o["rows_added"]
        )
        assert o["padding_before"] == sum(-f % o["tile"] for f in before) > 0
        assert o["padding_after"] == 0
        pairs = zip(after, before, strict=True)
        assert all(f % o["tile"] == 0 and abs(f - g) < o["tile"] for f, g in pairs)
        if o["policy"] == "up":
            assert o["rows_dropped"] == 0
        if o["policy"] == "down":
            assert o["rows_added"] == 0
        if o["policy"] == "balanced":
            assert abs(o["rows_after"] - o["rows_before"]) <= o["tile"] / 2


def test_route_is_a_function_of_its_seed(sonicmoe):
    first = sonicmoe("route", "--seed", 3).stdout
    assert first == sonicmoe("route", "--seed", 3, "--threads", 1).stdout
    assert first != sonicmoe("route", "--seed", 4).stdout


def test_skew_unbalances_the_experts(sonicmoe):
    def largest_share(skew):
        (o,) = route(sonicmoe, "--policy", "nearest", "--tile", 64, "--skew", skew)
        return max(o["rows_per_expert_before"]) / o["rows_before"]

    assert largest_share(0) < 1.2 / 32 < 2 / 32 < largest_share(1)


def test_many_experts_are_drawn_as_a_histogram(sonicmoe):
    text = sonicmoe("route", "--experts", 128, "--tokens", 4096, "--policy", "nearest").stdout
    assert "Experts by rows" in text
