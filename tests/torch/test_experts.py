"""The three entry forms against the definition in float64: values, gradients, layouts, edges."""

import eager
import pytest
import sonicmoe_cpp as sm
import torch
from sonicmoe_cpp.options import RoutedExpertOptions

T, D, N, E, K = 23, 20, 12, 5, 3
GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped")
UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")
FORMS = ("topk", "sorted", "pairs")


def close(ours, reference, dtype=torch.float32):
    """Error relative to the largest reference value; 2^-8 is bfloat16's half step, times the
    roundings on the way."""
    assert ours is not None and reference is not None
    assert ours.shape == reference.shape
    largest = reference.abs().max() if reference.numel() else torch.tensor(0.0)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    error = (ours.double() - reference.double()).abs()
    assert not ours.isnan().any()
    assert (error <= tolerance * largest).all(), f"{error.max():.3e} of {largest:.3e}"


def inputs(activation="swiglu", bias=False, transposed=False, dtype=torch.float32):
    g = 2 if activation in GATED else 1
    x = torch.randn(T, D)
    w1, w2 = torch.randn(E, g * N, D) / D**0.5, torch.randn(E, D, N) / N**0.5
    b1, b2 = (torch.randn(E, g * N), torch.randn(E, D)) if bias else (None, None)
    leaves = [None if t is None else t.to(dtype) for t in (x, w1, w2, b1, b2)]
    if transposed:
        for i in (1, 2):
            leaves[i] = leaves[i].transpose(1, 2).contiguous().transpose(1, 2)
    return [None if t is None else t.requires_grad_() for t in leaves]


def routing(form, dtype=torch.float32):
    if form == "topk":
        ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
        ids[0, 0], ids[1, 1], ids[2, 2] = -1, E, E + 7
        ids[3] = -1
        return (ids,), torch.rand(T, K).to(dtype)
    if form == "sorted":
        return (torch.tensor([4, 4, 9, 15, 20], dtype=torch.int32),), torch.rand(T).to(dtype)
    tokens, experts = torch.randint(0, T, (41,)), torch.randint(0, E, (41,))
    tokens[:3], experts[3:6] = (
        torch.tensor([-1, T, T + 1]),
        torch.tensor([-1, E, E + 3]),
    )
    tokens[7], experts[7] = tokens[8], experts[8]
    return (tokens.int(), experts.int()), torch.rand(41).to(dtype)


def run(form, x, w1, w2, ids, weights, b1, b2, **options):
    call = {"topk": sm.moe, "sorted": sm.moe_sorted, "pairs": sm.moe_pairs}[form]
    return call(x, w1, w2, *ids, weights, b1=b1, b2=b2, **options)


def reference(form, x, w1, w2, ids, weights, b1, b2, **options):
    if form == "topk":
        return eager.top_k(x, w1, w2, ids[0], weights, b1=b1, b2=b2, **options)
    if form == "pairs":
        return eager.pairs(x, w1, w2, *ids, weights, b1=b1, b2=b2, **options)
    ends = ids[0].tolist()
    experts = torch.full((x.shape[0],), -1)
    for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        experts[begin:end] = e
    return eager.pairs(
        x, w1, w2, torch.arange(x.shape[0]), experts, weights, b1=b1, b2=b2, **options
    )


def compare(form, dtype, bias, transposed, **options):
    activation = options.get("activation", "swiglu")
    leaves = inputs(activation, bias, transposed, dtype)
    ids, weights = routing(form, dtype)
    weights.requires_grad_()
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    double_weights = weights.detach().double().requires_grad_()
    grad = torch.randn(T, D).to(dtype)
    x, w1, w2, b1, b2 = leaves
    y = run(form, x, w1, w2, ids, weights, b1, b2, **options)
    y.backward(grad)
    x, w1, w2, b1, b2 = doubles
    expected = reference(form, x, w1, w2, ids, double_weights, b1, b2, **options)
    expected.backward(grad.double())
    close(y, expected, dtype)
    assert y.dtype == dtype
    for ours, theirs in zip([*leaves, weights], [*doubles, double_weights], strict=True):
        if ours is not None:
            assert ours.grad.dtype == dtype
            close(ours.grad, theirs.grad, dtype)
    return leaves


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients(form, dtype, transposed):
    leaves = compare(form, dtype, bias=True, transposed=transposed)
    if transposed:  # the gradient keeps the layout of the weight, so that no copy follows
        assert leaves[1].grad.stride() == leaves[1].stride()


@pytest.mark.parametrize("activation", GATED + UNGATED)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_activations_and_layouts(activation, layout):
    limit = {"limit": 0.5} if activation == "swiglu_clamped" else {}
    for bias in (False, True):
        compare(
            "topk",
            torch.float32,
            bias,
            False,
            activation=activation,
            gate_up_layout=layout,
            **limit,
        )


def test_finite_differences():
    x, w1, w2, _, _ = inputs()
    ids, weights = routing("topk")
    weights.requires_grad_()
    direction = [torch.randn_like(t) for t in (x, w1, w2, weights)]
    grad = torch.randn(T, D)
    y = sm.moe(x, w1, w2, *ids, weights)
    grads = torch.autograd.grad(y, (x, w1, w2, weights), grad)
    predicted = sum((g * v).sum() for g, v in zip(grads, direction, strict=True))
    step = 1e-3
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            moved = [
                t + sign * step * v for t, v in zip((x, w1, w2, weights), direction, strict=True)
            ]
            out = sm.moe(moved[0], moved[1], moved[2], *ids, moved[3])
            ends.append((out.double() * grad).sum())
    measured = (ends[0] - ends[1]) / (2 * step)
    assert abs(measured - predicted) < 2e-3 * abs(predicted)
    assert abs(predicted) > 1


def test_sentinels_are_exact_zeros():
    x, w1, w2, _, _ = inputs()
    (ids,), weights = routing("topk")
    weights.requires_grad_()
    y = sm.moe(x, w1, w2, ids, weights)
    y.sum().backward()
    dropped = (ids < 0) | (ids >= E)
    assert dropped.any() and (weights.grad[dropped] == 0).all()
    assert (weights.grad[~dropped] != 0).all()
    assert (y[3] == 0).all() and (x.grad[3] == 0).all()


def test_rows_past_the_offsets_may_be_nan():
    x, w1, w2, _, _ = inputs()
    (offsets,), weights = routing("sorted")
    clean = sm.moe_sorted(x, w1, w2, offsets, weights)
    last = int(offsets[-1])
    with torch.no_grad():
        x[last:] = float("nan")
        weights[last:] = float("nan")
    weights.requires_grad_()
    y = sm.moe_sorted(x, w1, w2, offsets, weights)
    y[:last].sum().backward()
    assert torch.equal(y[:last], clean[:last]) and (y[last:] == 0).all()
    assert (x.grad[last:] == 0).all() and (weights.grad[last:] == 0).all()
    assert not w1.grad.isnan().any()


def test_sorted_rows_without_weights():
    x, w1, w2, _, _ = inputs()
    (offsets,), _ = routing("sorted")
    ones = torch.ones(T)
    assert torch.equal(sm.moe_sorted(x, w1, w2, offsets), sm.moe_sorted(x, w1, w2, offsets, ones))


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    _, w1, w2, _, _ = inputs()
    x = torch.empty(0, D, requires_grad=True)
    ids = {
        "topk": (torch.empty(0, K, dtype=torch.int64),),
        "sorted": (torch.zeros(E, dtype=torch.int32),),
        "pairs": (torch.empty(0, dtype=torch.int32),) * 2,
    }[form]
    y = run(
        form,
        x,
        w1,
        w2,
        ids,
        torch.empty(0, K) if form == "topk" else torch.empty(0),
        None,
        None,
    )
    y.sum().backward()
    assert y.shape == (0, D) and x.grad.shape == (0, D)
    assert (w1.grad == 0).all() and (w2.grad == 0).all()


def test_leading_dimensions_and_strided_rows():
    _, w1, w2, _, _ = inputs()
    (ids,), weights = routing("topk")
    wide = torch.randn(T, 2 * D)
    flat = sm.moe(wide[:, :D].contiguous(), w1, w2, ids, weights)
    assert torch.equal(sm.moe(wide[:, :D], w1, w2, ids, weights), flat)
    folded = sm.moe(wide[:, :D].unflatten(0, (1, T)), w1, w2, ids.unflatten(0, (1, T)), weights)
    assert folded.shape == (1, T, D) and torch.equal(folded[0], flat)


def test_same_bits_for_id_types_and_threads():
    x, w1, w2, _, _ = inputs()
    (ids,), weights = routing("topk")

    def everything(ids):
        y = sm.moe(x, w1, w2, ids, weights)
        return y, *torch.autograd.grad(y.square().sum(), (x, w1, w2))

    base = everything(ids)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything(ids.int())
    finally:
        torch.set_num_threads(threads)
    for ours, theirs in zip(base, one, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_bytes_kept_for_backward(form):
    x, w1, w2, b1, b2 = inputs(bias=True)
    ids, weights = routing(form)
    weights.requires_grad_()
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(form, x, w1, w2, ids, weights, b1, b2)
    for given in (x, w1, w2, b1, b2):
        kept.pop(given.untyped_storage().data_ptr(), None)
    pairs = weights.numel()
    metadata = {
        "topk": 4 * (E + 3 * pairs),
        "sorted": 4 * E,
        "pairs": 4 * (E + 4 * pairs + T + 1),
    }[form]
    routing_bytes = weights.nbytes + sum(t.nbytes for t in ids)
    assert sum(kept.values()) == pairs * 2 * N * 4 + metadata + routing_bytes


def test_inference_keeps_nothing_and_gives_the_same_bits():
    x, w1, w2, _, _ = inputs()
    (ids,), weights = routing("topk")
    y = sm.moe(x, w1, w2, ids, weights)
    with torch.no_grad():
        _, h, metadata, _ = torch.ops.sonicmoe_cpp.moe_forward(
            x, w1, None, w2, None, 0, ids, None, weights, *RoutedExpertOptions().pack(), False
        )
        assert h.numel() == 0 and metadata.numel() == 0
        assert torch.equal(sm.moe(x, w1, w2, ids, weights), y)


def test_no_slots_give_zeros():
    x, w1, w2, _, _ = inputs()
    ids, weights = torch.zeros(T, 0, dtype=torch.int64), torch.zeros(T, 0, requires_grad=True)
    y = sm.moe(x, w1, w2, ids, weights)
    assert y.shape == x.shape and not y.any()
    y.sum().backward()
    for given in (x, w1, w2):
        assert given.grad.shape == given.shape and not given.grad.any()
    assert weights.grad.shape == (T, 0)


def test_only_the_gradients_asked_for():
    x, w1, w2, _, _ = inputs()
    (ids,), weights = routing("topk")
    w1.requires_grad_(False)
    sm.moe(x, w1, w2, ids, weights).sum().backward()
    assert w1.grad is None and weights.grad is None
    assert x.grad is not None and w2.grad is not None


def test_double_backward_is_refused():
    x, w1, w2, _, _ = inputs()
    (ids,), weights = routing("topk")
    y = sm.moe(x, w1, w2, ids, weights)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_autocast_casts_x_and_the_weights():
    x, w1, w2, b1, b2 = inputs(bias=True)
    (ids,), weights = routing("topk")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sm.moe(x, w1, w2, ids, weights, b1=b1, b2=b2)
    cast = [t.detach().bfloat16() for t in (x, w1, w2)]
    explicit = sm.moe(*cast, ids, weights, b1=b1.bfloat16(), b2=b2.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, explicit)
    y.float().sum().backward()
    assert w1.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w2": torch.randn(E, D, N + 1)}, "w1: expected"),
        ({"w1": torch.randn(E, 2 * N, D + 1)}, "w1"),
        ({"x": torch.randn(T, D).bfloat16()}, "dtype|bfloat16"),
        ({"x": torch.randn(T, D).half()}, "x: expected"),
        ({"ids": torch.zeros(T + 1, K, dtype=torch.int64)}, "topk_ids"),
        ({"ids": torch.zeros(T, K)}, "topk_ids"),
        ({"ids": torch.tensor(0)}, "topk_ids: expected at least 1 dimension, got shape"),
        ({"activation": "sigmoid"}, "activation: expected one of swiglu"),
        ({"gate_up_layout": "swapped"}, "gate_up_layout: expected one of concatenated"),
        ({"limit": -1.0, "activation": "swiglu_clamped"}, "limit"),
        ({"b1": torch.randn(E, N)}, "b1"),
    ],
)
def test_errors_are_one_clear_line(change, message):
    x, w1, w2, _, _ = inputs()
    (ids,), weights = routing("topk")
    given = {"x": x, "w1": w1, "w2": w2, "ids": ids} | change
    options = {k: v for k, v in given.items() if k not in ("x", "w1", "w2", "ids")}
    with pytest.raises((RuntimeError, ValueError), match=message) as error:
        sm.moe(given["x"], given["w1"], given["w2"], given["ids"], weights, **options)
    assert "\n" not in str(error.value).strip()
