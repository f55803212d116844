"""max_rows, first_expert and tokens without rows, through Python."""

import pytest
import sonicmoe_cpp as sm
import torch
from sonicmoe_cpp._library import lists_tokens, row_lists_bytes
from sonicmoe_cpp.options import ExpertOptions, LayerOptions, RoutedExpertOptions, RouterOptions
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

ops = torch.ops.sonicmoe_cpp
T, D, N, E, K = 37, 16, 12, 5, 3
FIRST = 20  # id of the first of the E experts
FORMS = ("topk", "pairs")


def experts():
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (T, D), "w1": (E, 2 * N, D), "w2": (E, D, N), "b1": (E, 2 * N), "b2": (E, D)}
    return {
        name: torch.randn(shape, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def routing(form):
    """About a half of the ids is foreign."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(FIRST - 4, FIRST + E + 3, (T, K), generator=generator)
    weights = torch.rand(T, K, generator=generator)
    if form == "topk":
        return {"topk_ids": ids, "topk_weights": weights.requires_grad_()}
    tokens = torch.randint(0, T, (T * K,), generator=generator)
    pairs = {"token_ids": tokens, "expert_ids": ids.flatten()}
    return pairs | {"pair_weights": weights.flatten().requires_grad_()}


def ids_of(given):
    return given["topk_ids"] if "topk_ids" in given else given["expert_ids"]


def own(ids):
    """Places of the pairs of own experts, in the order of the rows."""
    flat = ids.flatten()
    places = ((flat >= FIRST) & (flat < FIRST + E)).nonzero().flatten()
    return places[flat[places].argsort(stable=True)]


def run(form, given, **options):
    """y, then the gradients of all that has one."""
    tensors = experts()
    function = sm.moe if form == "topk" else sm.moe_pairs
    y = function(**tensors, **given, **options)
    leaves = [t for t in (*tensors.values(), *given.values()) if t.requires_grad]
    grad = torch.randn(T, D, generator=torch.Generator().manual_seed(9))
    return [y, *torch.autograd.grad(y, leaves, grad)]


def assert_equal(results, expected):
    assert len(results) == len(expected)
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize("form", FORMS)
def test_slots_beyond_max_rows_are_dropped_slots(form):
    given = routing(form)
    rows = own(ids_of(given))
    unbounded = run(form, given, first_expert=FIRST)
    assert all(result.abs().sum() > 0 for result in unbounded)
    for most in (0, 1, len(rows) // 2, len(rows) - 1, len(rows), len(rows) + 1, T * K + 9):
        dropped = torch.zeros(1, dtype=torch.int32)
        bounded = run(form, given, first_expert=FIRST, max_rows=most, rows_dropped=dropped)
        assert dropped.item() == max(0, len(rows) - most)
        by_hand = {
            key: t.detach().clone().requires_grad_(t.requires_grad) for key, t in given.items()
        }
        ids_of(by_hand).view(-1)[rows[most:]] = -1
        assert_equal(bounded, run(form, by_hand, first_expert=FIRST))
        if most >= len(rows):
            assert_equal(bounded, unbounded)


@pytest.mark.parametrize("form", FORMS)
def test_first_expert_is_a_subtraction(form):
    given = routing(form)
    ids = ids_of(given)
    name = "topk_ids" if form == "topk" else "expert_ids"
    shifted = torch.where((ids >= FIRST) & (ids < FIRST + E), ids - FIRST, -1)
    assert_equal(run(form, given, first_expert=FIRST), run(form, given | {name: shifted}))


def test_what_is_kept_is_bounded():
    given, kept = routing("topk"), []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sm.moe(**experts(), **given, first_expert=FIRST, max_rows=10)
    (h,) = (tensor for tensor in kept if tensor.shape == (10, 2 * N))
    assert h.dtype == torch.float32
    metadata = max(t.nbytes for t in kept if t.dtype == torch.uint8)
    assert metadata == 4 * (E + T * K + 2 * 10)


def test_drops_add_up_in_every_call_and_mode():
    given, tensors = routing("topk"), experts()
    rows = len(own(given["topk_ids"]))
    dropped = torch.zeros(1, dtype=torch.int32)
    options = {"first_expert": FIRST, "max_rows": rows - 2, "rows_dropped": dropped}
    with torch.no_grad():
        sm.moe(**tensors, **given, **options)
    assert dropped.item() == 2
    checkpoint(sm.moe, **tensors, **given, **options, use_reentrant=False).sum().backward()
    assert dropped.item() == 4  # a recomputed forward stops before it counts
    compiled = torch.compile(sm.moe, fullgraph=True, backend="aot_eager")
    eager = sm.moe(**tensors, **given, **options)
    assert torch.equal(compiled(**tensors, **given, **options), eager)
    assert dropped.item() == 8
    sm.moe(**tensors, **given, first_expert=FIRST, rows_dropped=dropped)  # no bound, none dropped
    assert dropped.item() == 8


@pytest.mark.parametrize("router", ["topk", "token_rounding"])
def test_the_layer_and_the_module_count(router):
    torch.manual_seed(0)
    layer = sm.MoE(D, N, E, K, router=router, tile=4)
    x = torch.randn(T, D)
    y = layer(x)
    assert layer.last_rows_dropped is None
    rows = int(layer.last_rows_per_expert.sum())
    bounded = sm.MoE(D, N, E, K, router=router, tile=4, max_rows=rows - 3)
    bounded.load_state_dict(layer.state_dict())
    assert not torch.equal(bounded(x), y)
    assert bounded.last_rows_dropped.tolist() == [3]
    exact = sm.MoE(D, N, E, K, router=router, tile=4, max_rows=rows)
    exact.load_state_dict(layer.state_dict())
    assert torch.equal(exact(x), y) and exact.last_rows_dropped.tolist() == [0]
    dropped = torch.ones(1, dtype=torch.int32)
    tensors = layer.router.weight, layer.experts.w1, layer.experts.w2
    sm.moe_layer(
        x, *tensors, K, router=router, tile=4, max_rows=rows - 3, rows_dropped=dropped
    )  # fmt: skip
    assert dropped.tolist() == [4]


def test_tokens_without_rows_are_zero_unless_told_otherwise():
    given = routing("topk")
    has_row = ((given["topk_ids"] >= FIRST) & (given["topk_ids"] < FIRST + E)).any(1)
    assert 0 < has_row.sum() < T
    whole = run("topk", given, first_expert=FIRST)
    assert not whole[0][~has_row].any() and not whole[1][~has_row].any()
    part = run("topk", given, first_expert=FIRST, zero_absent_tokens=False)
    for index, (result, right) in enumerate(zip(part, whole, strict=True)):
        kept = has_row if index < 2 else slice(None)  # y and x's gradient
        assert torch.equal(result[kept], right[kept])


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("moe", {"max_rows": -1}, "moe: max_rows: expected"),
        ("moe", {"max_rows": 1.5}, "moe: max_rows: expected"),
        ("moe", {"first_expert": -1}, "moe: first_expert: expected"),
        ("moe", {"zero_absent_tokens": 1}, "zero_absent_tokens: expected True or False, got 1"),
        ("moe", {"rows_dropped": torch.zeros(1)}, "moe: rows_dropped: expected int32, got float32"),
        ("moe", {"rows_dropped": torch.zeros(2, dtype=torch.int32)}, r"expected shape \[1\]"),
        ("moe_pairs", {"max_rows": -1}, "moe_pairs: max_rows: expected"),
        ("moe_pairs", {"rows_dropped": 3}, "moe_pairs: rows_dropped: expected a tensor, got int 3"),
        ("moe_sorted", {"max_rows": 4}, "moe_sorted: max_rows: expected None, .+ got 4"),
        ("moe_layer", {"rows_dropped": torch.zeros(1)}, "moe_layer: rows_dropped: expected int32"),
        ("MoE", {"max_rows": -2}, "MoE: max_rows: expected"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(function, options, message):
    tensors = experts()
    calls = {
        "moe": lambda: sm.moe(**tensors, **routing("topk"), **options),
        "moe_pairs": lambda: sm.moe_pairs(**tensors, **routing("pairs"), **options),
        "moe_sorted": lambda: sm.moe_sorted(
            **tensors, offsets=torch.full((E,), T, dtype=torch.int32), **options
        ),
        "moe_layer": lambda: sm.moe_layer(
            tensors["x"], torch.randn(E, D), tensors["w1"], tensors["w2"], K, **options
        ),
        "MoE": lambda: sm.MoE(D, N, E, K, **options),
    }
    with pytest.raises((ValueError, RuntimeError), match=message):
        calls[function]()


@pytest.mark.parametrize("function", ["moe_sorted", "moe_layer"])
def test_routing_of_all_experts_takes_no_first_expert(function):
    with pytest.raises(TypeError, match=f"{function}.. got an unexpected .+ 'first_expert'"):
        tensors = experts()
        if function == "moe_sorted":
            offsets = torch.full((E,), T, dtype=torch.int32)
            sm.moe_sorted(**tensors, offsets=offsets, first_expert=0)
        else:
            weights = torch.randn(E, D), tensors["w1"], tensors["w2"]
            sm.moe_layer(tensors["x"], *weights, K, first_expert=0)


def test_operators_keep_their_contract():
    """Fakes, schemas and autograd with a bound that all rows fill: no place of H is undefined."""
    tensors, given = experts(), routing("topk")
    weights = [tensors[name] for name in ("w1", "b1", "w2", "b2")]
    options = RoutedExpertOptions(max_rows=8, first_expert=FIRST).pack()
    slots = (0, given["topk_ids"], None, given["topk_weights"])
    opcheck(ops.moe_forward, (tensors["x"], *weights, *slots, *options, True))
    layer = LayerOptions(ExpertOptions(max_rows=8), RouterOptions(top_k=K), None).pack()
    w = torch.randn(E, D, requires_grad=True)
    opcheck(ops.moe_layer_forward, (tensors["x"], w, None, *weights, None, None, *layer, True))


def test_tokens_are_listed_where_few_slots_of_top_k_have_rows():
    """The same cases as tests/unit/cuda/backward_plan_test.cpp."""
    assert lists_tokens(2048, 1024, 4) and lists_tokens(2048, 1024, 16)
    assert not lists_tokens(2049, 1024, 4)
    assert not lists_tokens(2048, 1024, 17)
    assert not lists_tokens(2048, 1024, None)  # pair lists
    cuda = torch.device("cuda")
    more = row_lists_bytes(cuda, 2048, 8, 1024) - row_lists_bytes(cuda, 2048, 8, 0)
    assert more == 4 * 1024 + 128
