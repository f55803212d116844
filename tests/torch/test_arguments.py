"""One tensor at a time made wrong: each call is refused by the argument's name, or right.

Tables of operations and of mutations; the shapes of every round come from a fixed seed. A tensor of
another layout has to give what the same values give in a contiguous tensor, gradients included.
"""

import itertools
import math
import warnings

import eager
import pytest
import sonicmoe_cpp as sm
import torch
from operations import OPERATIONS, Maker, Operation, assert_clear
from torch import Tensor

NAN, INF = math.nan, math.inf
OPTIONAL = {"b1", "b2", "row_weights", "router_bias", "selection_bias"}
DTYPES = {
    **{ids: {torch.int32, torch.int64} for ids in ("topk_ids", "token_ids", "expert_ids")},
    **{counts: {torch.int32} for counts in ("offsets", "rows_per_expert")},
    "selection_bias": {torch.float32},
    "logits": {torch.float32, torch.bfloat16, torch.float16},
}
FLOATS = {torch.float32, torch.bfloat16}

# ------------------------------------------------------------------------------------ mutations

REFUSED, RIGHT = "refused by its name", "right"
NAMED, EITHER = "right, or refused by its name", "right, or refused by any name"


def spread(tensor: Tensor) -> Tensor:
    """The same values at twice the strides."""
    wide = torch.full([2 * size for size in tensor.shape], 7).to(tensor.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values one byte off any alignment."""
    memory = bytearray(tensor.numel() * tensor.element_size() + 1)
    count = tensor.numel()
    view = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=1).view(tensor.shape)
    return view.copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor


def overlapping(tensor: Tensor) -> Tensor:
    strides = [1] * tensor.dim()
    return tensor.as_strided(tensor.shape, strides)


def layouts(name: str, tensor: Tensor):
    """Values in memory that is not plain. Parameters are never copied, so some strides are refused
    for them; everything else is taken as it is."""
    parameter = name.startswith(("w", "b", "router", "selection_bias"))
    copied = NAMED if parameter else RIGHT
    yield "spread", spread(tensor), copied
    yield "misaligned", misaligned(tensor), REFUSED
    yield "transposed", transposed(tensor), RIGHT if name in ("w1", "w2") else copied
    if tensor.is_floating_point() and name != "selection_bias":
        yield "overlapping", overlapping(tensor), RIGHT
        for dim in range(tensor.dim()):
            narrow = tensor.narrow(dim, 0, 1).expand(tensor.shape)
            yield f"expanded in {dim}", narrow, RIGHT if dim + 1 < tensor.dim() else copied
        if tensor.dtype == torch.float32:
            negative = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
            yield "negative bit", negative, copied


def types(name: str, tensor: Tensor):
    yield "None", None, EITHER if name in OPTIONAL else REFUSED
    for value in (3, 2.5, "text", [1, 2], tensor.tolist(), object(), tensor.numpy, Tensor):
        yield f"{type(value).__name__}", value, REFUSED
    yield "sparse", tensor.to_sparse(), REFUSED
    if tensor.dtype == torch.float32:
        yield "mkldnn", tensor.to_mkldnn(), REFUSED
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield "quantized", torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8), REFUSED
    parts = [torch.ones(2), torch.ones(3)]
    yield "nested", torch.nested.nested_tensor(parts, layout=torch.jagged), REFUSED
    for dtype in (
        torch.float16, torch.float64, torch.bfloat16, torch.float32, torch.bool, torch.uint8,
        torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn,
    ):  # fmt: skip
        if dtype != tensor.dtype:
            legal = dtype in DTYPES.get(name, FLOATS)
            yield f"{dtype}", tensor.to(dtype), EITHER if legal else REFUSED


def shapes(name: str, tensor: Tensor):
    yield "scalar", tensor.flatten()[0], REFUSED
    yield "one dimension more", tensor[None], EITHER
    yield "flattened", tensor.flatten(), EITHER
    for dim in range(tensor.dim()):
        yield f"longer in {dim}", torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim), EITHER
        if tensor.shape[dim] > 1:
            yield f"shorter in {dim}", tensor.narrow(dim, 1, tensor.shape[dim] - 1), EITHER
        yield f"empty in {dim}", tensor.narrow(dim, 0, 0), EITHER


def devices(name: str, tensor: Tensor, first: bool):
    yield "meta", tensor.to("meta"), EITHER if first else REFUSED


def mutations(name: str, tensor: Tensor, first: bool):
    yield from itertools.chain(
        layouts(name, tensor), types(name, tensor), shapes(name, tensor),
        devices(name, tensor, first),
    )  # fmt: skip


# --------------------------------------------------------------------------------------- judging


def plain(value):
    """The same argument in memory of its own, where it is a dense tensor."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        return value
    return value.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


def results(operation: Operation, arguments: dict) -> list[Tensor]:
    """Outputs and gradients of every argument that has one."""
    leaves = []
    given = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name != "selection_bias":
            given[name] = value.detach().requires_grad_()
            leaves.append(given[name])
    out = operation.call(**given)
    outputs = list(out) if isinstance(out, tuple) else [out]
    graded = [o for o in outputs if o.requires_grad]
    if not graded or graded[0].device.type == "meta":
        return outputs
    weights = [torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view(o.shape) for o in graded]
    found = torch.autograd.grad(graded, leaves, weights, allow_unused=True)
    return [o.detach() for o in outputs] + [g for g in found if g is not None]


def assert_same(ours: list[Tensor], right: list[Tensor], what: str) -> None:
    assert len(ours) == len(right), what
    for a, b in zip(ours, right, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device, what
        if a.numel() == 0:
            continue
        tolerance = 2e-2 if a.dtype == torch.bfloat16 else 1e-5
        largest = float(b.double().abs().max())
        assert math.isfinite(largest), what
        assert (a.double() - b.double()).abs().max() <= tolerance * largest, what


def judge(operation: str, arguments: dict, argument: str, value, expected: str, label: str) -> None:
    op = OPERATIONS[operation]
    what = f"{operation}({argument}: {label})"
    given = arguments | {argument: value}
    public = operation.split(",")[0]
    kept = {name: plain(v) for name, v in given.items()}
    try:
        ours = results(op, given)
    except (RuntimeError, ValueError) as error:
        assert expected != RIGHT, f"{what}: {error}"
        assert_clear(error, public, None if expected == EITHER else argument, what)
        return
    assert expected != REFUSED, f"{what}: accepted"
    if ours[0].device.type == "meta":
        assert len(op.tensors) == 1, f"{what}: a result on meta"
        return
    assert_same(ours, results(op, kept), what)


# Few rounds: every new shape costs oneDNN a primitive.
ROUNDS = [(seed, (torch.float32, torch.bfloat16)[seed % 2]) for seed in range(2)]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_wrong_tensor(operation):
    op = OPERATIONS[operation]
    for seed, dtype in ROUNDS:
        for index, argument in enumerate(op.tensors):
            maker = Maker(seed, dtype)
            tensor = op.arguments(maker)[argument]
            for label, value, expected in mutations(argument, tensor, index == 0):
                arguments = op.arguments(Maker(seed, dtype))
                judge(operation, arguments, argument, value, expected, label)


# ----------------------------------------------------------------------------------------- values


def reference(operation: str, arguments: dict) -> Tensor:
    """y in float64, row by row."""
    given = {n: v.double() if v.is_floating_point() else v for n, v in arguments.items()}
    if operation == "moe":
        ids, weights = given.pop("topk_ids"), given.pop("topk_weights")
        return eager.top_k(ids=ids, weights=weights, **given)
    tokens, experts = given.pop("token_ids"), given.pop("expert_ids")
    return eager.pairs(tokens=tokens, experts=experts, weights=given.pop("pair_weights"), **given)


@pytest.mark.parametrize("operation", ["moe", "moe_pairs"])
def test_values_out_of_the_ordinary(operation):
    """NaN spreads to what depends on it and no further; ids that name nothing are dropped."""
    op = OPERATIONS[operation]
    for argument in op.tensors:
        tensor = op.arguments(Maker(2, torch.float32))[argument]
        odd = (NAN, INF) if tensor.is_floating_point() else (-1, -(2**63), 2**31, 2**63 - 1)
        for value, place in itertools.product(odd, (0, -1)):
            arguments = op.arguments(Maker(2, torch.float32))
            arguments[argument].view(-1)[place] = value
            right = reference(operation, arguments).float()
            ours = op.call(**arguments)
            what = f"{operation}({argument}[{place}] = {value})"
            finite = right.isfinite()
            assert torch.equal(ours.isfinite(), finite), what
            largest = right[finite].abs().max()
            assert largest > 0 and (ours - right)[finite].abs().max() <= 1e-5 * largest, what


def routers():
    for operation, op in OPERATIONS.items():
        for argument in ("logits", "selection_bias", "x", "router_weight", "router_bias"):
            if "top_k" in op.others and "loss" not in operation and argument in op.tensors:
                yield operation, argument


@pytest.mark.parametrize(("operation", "argument"), list(routers()))
def test_nan_in_the_router_is_refused(operation, argument):
    op = OPERATIONS[operation]
    arguments = op.arguments(Maker(0, torch.float32))
    arguments[argument].view(-1)[0] = NAN
    with pytest.raises(RuntimeError, match=r"(logits|bias): expected .+, got NaN"):
        op.call(**arguments)


@pytest.mark.parametrize("values", [[3, 2, 5, 6], [-1, 2, 3, 4], [1, 2, 3, 2**31 - 1]])
def test_offsets_that_are_no_offsets_are_refused(values):
    w1, w2, rows = torch.randn(4, 8, 6), torch.randn(4, 6, 4), torch.randn(9, 6)
    with pytest.raises(RuntimeError, match=r"offsets: expected .+, got .+"):
        sm.moe_sorted(rows, w1, w2, torch.tensor(values, dtype=torch.int32))


# ------------------------------------------------------------------------------ what goes together


def routed(*leading):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4, (24, 2), generator=generator).view(*leading, 2)
    return ids, torch.rand(24, 2, generator=generator).view(*leading, 2)


def experts(leading, ids, weights):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 6, generator=generator).view(*leading, 6)
    w1, w2 = (torch.randn(*shape, generator=generator) for shape in ((4, 8, 6), (4, 6, 4)))
    return sm.moe(x, w1, w2, ids, weights)


@pytest.mark.parametrize(
    ("x", "ids", "weights"),
    [((4, 6), (24,), (24,)), ((24,), (4, 6), (4, 6)), ((2, 3, 4),) * 3, ((4, 6), (4, 6), (24,))],
)
def test_leading_dimensions_may_be_equal_or_flattened(x, ids, weights):
    right = experts((24,), *routed(24))
    ours = experts(x, routed(*ids)[0], routed(*weights)[1])
    assert ours.shape == (*x, 6) and torch.equal(ours.view(24, 6), right)


@pytest.mark.parametrize(
    ("x", "ids", "weights", "named"),
    [
        ((4, 6), (6, 4), (6, 4), "topk_ids"),
        ((4, 6), (4, 6), (6, 4), "topk_weights"),
        ((24,), (4, 6), (6, 4), "topk_weights"),
        ((4, 6), (24,), (6, 4), "topk_weights"),
        ((2, 3, 4), (6, 4), (6, 4), "topk_ids"),
        ((2, 12), (1, 2, 12), (2, 12), "topk_ids"),
    ],
)
def test_leading_dimensions_that_differ_are_refused(x, ids, weights, named):
    with pytest.raises(RuntimeError, match=rf"moe: {named}: expected leading dimensions"):
        experts(x, routed(*ids)[0], routed(*weights)[1])


def test_a_selection_bias_may_require_grad():
    """It selects only: whether a Parameter or a buffer, nothing flows back to it."""
    bias = torch.nn.Parameter(torch.tensor([0.0, 3.0, 0.0]))
    logits = torch.randn(5, 3, requires_grad=True)
    ids, weights = sm.route(
        logits, 1, scoring="sigmoid_topk", selection_bias=bias, renormalize=False
    )
    assert (ids == 1).all()
    weights.sum().backward()
    assert bias.grad is None and logits.grad.abs().max() > 0
