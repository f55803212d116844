"""What the GPU benchmarks compute without a GPU: routings of chosen skew, padding, kernels' parts."""

import re
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "bench"))

import bench_gpu_cases as cases
import routings

T, E, K = 2048, 64, 6


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("draw", cases.SKEWS.values(), ids=cases.SKEWS)
def test_a_token_takes_distinct_experts_that_exist(draw, generator):
    ids = draw(T, E, K, generator)
    assert ids.shape == (T, K) and ids.dtype == torch.int32
    assert 0 <= ids.min() and ids.max() < E
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


def test_every_kernel_of_the_library_has_a_part():
    launch_bounds = r"(?:__cluster_dims__\([^)]*\)\s*)?(?:__launch_bounds__\([^)]*\)\s*)?"
    pattern = re.compile(rf"__global__ void\s+{launch_bounds}(\w+)\(")
    sources = [p.read_text() for p in (REPOSITORY / "src" / "cuda").rglob("*.cu*")]
    declared = sum(source.count("__global__ void") for source in sources)
    kernels = [name for source in sources for name in pattern.findall(source)]
    assert len(kernels) == declared
    assert set(kernels) == set(cases.PART_OF) - {"Memset"}


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


def test_arguments():
    assert cases.parse_arguments([]).case is None
    assert cases.parse_arguments(["--case", "skew", "--case", "limit"]).case == ["skew", "limit"]
    with pytest.raises(SystemExit):
        cases.parse_arguments(["--case", "other"])


def test_plots_take_the_newest_record_and_the_better_of_wall_and_busy():
    pytest.importorskip("matplotlib")
    import plot_gpu

    row = {"T": 1000, "d": 10, "n": 10, "E": 4, "K": 1, "fwd_ms": 1.0, "bwd_ms": 4.0}
    old, new = (
        {"date": date, "rows": [row | {"shape": "a", "system": "sonicmoe"}]} for date in "12"
    )
    undated = {"rows": [{}]}
    assert plot_gpu.newest([new, undated, old], "system", "sonicmoe") is new
    assert plot_gpu.newest([new, undated], "case", "limit") is None
    anchors = {
        "rows": [
            {"shape": "a", "system": "peer", "wall": [100, 700], "busy": [400, 400]},
            {"shape": "b", "system": "peer", "wall": [1, 1]},
        ]
    }
    assert plot_gpu.speeds(new, anchors) == {
        "a": {"sonicmoe": pytest.approx((6e-4, 3e-4)), "peer": (400, 400)}
    }
