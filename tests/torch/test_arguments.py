"""One argument at a time made wrong: each call is refused by the argument's name, or right.

Tables of operations and of mutations; the shapes of every round come from a fixed seed. A tensor of
another layout has to give what the same values give in a contiguous tensor, gradients included.
"""

import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import eager
import pytest
import sonicmoe_cpp as sm
import torch
from torch import Tensor

# ------------------------------------------------------------------------------------- operations


def sizes(generator) -> dict[str, int]:
    def pick(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    experts = 2 * pick(1, 3)
    return {"T": pick(4, 9), "d": pick(2, 9), "n": pick(1, 6), "E": experts, "K": pick(1, experts)}


class Maker:
    """Legal arguments by name, for the sizes and the dtype of one round."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.sizes = sizes(self.generator)

    def floats(self, *shape, dtype=None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def indices(self, high, *shape) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def make(self, name: str):
        T, d, n, E, K = (self.sizes[letter] for letter in "TdnEK")  # noqa: N806
        exact = torch.float32
        makers = {
            "x": lambda: self.floats(T, d),
            "rows": lambda: self.floats(T, d),
            "w1": lambda: self.floats(E, 2 * n, d),
            "w2": lambda: self.floats(E, d, n),
            "b1": lambda: self.floats(E, 2 * n),
            "b2": lambda: self.floats(E, d),
            "topk_ids": lambda: self.indices(E, T, K),
            "topk_weights": lambda: self.floats(T, K),
            "offsets": lambda: self.indices(T, E).sort()[0].int(),
            "row_weights": lambda: self.floats(T),
            "token_ids": lambda: self.indices(T, 2 * T),
            "expert_ids": lambda: self.indices(E, 2 * T),
            "pair_weights": lambda: self.floats(2 * T),
            "router_w": lambda: self.floats(E, d, dtype=exact),
            "router_b": lambda: self.floats(E, dtype=exact),
            "logits": lambda: self.floats(T, E, dtype=exact),
            "bias": lambda: self.floats(E, dtype=exact),
            "rows_per_expert": lambda: self.indices(E, T * K).bincount(minlength=E).int(),
            "top_k": lambda: K,
            "tile": lambda: 2,
            "rate": lambda: 0.1,
        }
        return makers[name]()


class Operation(NamedTuple):
    call: Callable
    tensors: tuple[str, ...]
    others: tuple[str, ...] = ()
    fixed: dict = {}
    options: tuple[str, ...] = ()

    def arguments(self, maker: Maker) -> dict:
        return {name: maker.make(name) for name in (*self.tensors, *self.others)} | self.fixed


EXPERT_OPTIONS = ("activation", "gate_up_layout", "limit", "workspace_limit")
ROUTER_OPTIONS = ("top_k", "scoring", "renormalize", "num_groups", "top_groups", "scale")
ROUNDING_OPTIONS = ("tile", "policy", "seed")
WEIGHTS = ("w1", "w2", "b1", "b2")
SIGMOID = {"scoring": "sigmoid_topk"}
ROUNDED = SIGMOID | {"router": "token_rounding", "policy": "stochastic"}
LAYER = ("x", "router_w", *WEIGHTS, "router_b", "bias")
OPERATIONS = {
    "moe": Operation(
        sm.moe, ("x", *WEIGHTS, "topk_ids", "topk_weights"), (), {},
        (*EXPERT_OPTIONS, "deterministic"),
    ),
    "moe_sorted": Operation(
        sm.moe_sorted, ("rows", *WEIGHTS, "offsets", "row_weights"), (), {}, EXPERT_OPTIONS
    ),
    "moe_pairs": Operation(
        sm.moe_pairs, ("x", *WEIGHTS, "token_ids", "expert_ids", "pair_weights"), (), {},
        (*EXPERT_OPTIONS, "deterministic"),
    ),
    "route": Operation(sm.route, ("logits", "bias"), ("top_k",), SIGMOID, ROUTER_OPTIONS),
    "round_tokens": Operation(
        sm.round_tokens, ("logits", "bias"), ("top_k", "tile"), SIGMOID,
        (*ROUTER_OPTIONS, *ROUNDING_OPTIONS),
    ),
    "load_balancing_loss": Operation(
        sm.load_balancing_loss, ("logits", "rows_per_expert"), ("top_k",), {},
        ("top_k", "scoring"),
    ),
    "router_z_loss": Operation(sm.router_z_loss, ("logits",)),
    "update_expert_bias_": Operation(
        sm.update_expert_bias_, ("bias", "rows_per_expert"), ("rate",), {}, ("rate",)
    ),
    "moe_layer": Operation(sm.moe_layer, LAYER, ("top_k",), SIGMOID),
    "moe_layer, rounded": Operation(
        sm.moe_layer, LAYER, ("top_k", "tile"), ROUNDED,
        (*EXPERT_OPTIONS, *ROUTER_OPTIONS, *ROUNDING_OPTIONS, "deterministic", "router",
         "main_grad"),
    ),
}  # fmt: skip
OPTIONAL = {"b1", "b2", "row_weights", "router_b", "bias"}
DTYPES = {
    **dict.fromkeys(("topk_ids", "token_ids", "expert_ids"), {torch.int32, torch.int64}),
    **dict.fromkeys(("offsets", "rows_per_expert"), {torch.int32}),
    "bias": {torch.float32},
    "logits": {torch.float32, torch.bfloat16, torch.float16},
}
FLOATS = {torch.float32, torch.bfloat16}

# ------------------------------------------------------------------------------------ mutations

REFUSED, RIGHT = "refused by its name", "right"
NAMED, EITHER = "right, or refused by its name", "right, or refused by any name"
# The library's own names, where they differ.
ALIASES = {
    "router_w": "router_weight", "router_b": "router_bias", "bias": "selection_bias", "rows": "x"
}  # fmt: skip


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
    parameter = name.startswith(("w", "b", "router"))
    copied = NAMED if parameter else RIGHT
    yield "spread", spread(tensor), copied
    yield "misaligned", misaligned(tensor), REFUSED
    yield "transposed", transposed(tensor), RIGHT if name in ("w1", "w2") else copied
    if tensor.is_floating_point() and name != "bias":
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
        if isinstance(value, Tensor) and value.is_floating_point() and name != "bias":
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


def assert_clear(error: Exception, operation: str, argument: str | None, what: str) -> None:
    """operation: argument: expected X, got Y, on one line; `argument` None is any."""
    text = str(error)
    found = re.fullmatch(r"(\w+): (\w+): expected (.+), got (.+)", text)
    assert found, f"{what}: {text}"
    ours = ("moe", operation.rstrip("_"), "rounded_capacity")
    assert found[1].startswith(ours), f"{what}: {text}"
    if argument is not None:
        assert found[2] in (argument, ALIASES.get(argument)), f"{what}: {text}"


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


ROUNDS = [(0, torch.float32), (1, torch.bfloat16)]  # every new shape costs a oneDNN primitive


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


# ---------------------------------------------------------------------------------------- options

NAN, INF = math.nan, math.inf
NO_NUMBER = ("2", None, True, [2], (1,), object(), torch.tensor([2, 2]), torch.tensor(2.0))
NO_INTEGER = (*NO_NUMBER, False, 2.0, 2.5, NAN, -1, 2**63, 2**70, -(2**63), 1j)
NO_FLOAT = (*NO_NUMBER, NAN, 1j, torch.tensor(2))
NO_NAME = ("nope", "", "SWIGLU", None, 0, ["swiglu"], b"topk", True)
NO_FLAG = (0, 1, "True", [], torch.tensor(True), object())
WRONG = {
    "top_k": (*NO_INTEGER, 0, 7, 2**31, torch.tensor(2)),
    "num_groups": (*NO_INTEGER, 0, 7, 2**31),
    "top_groups": (*NO_INTEGER, 0, 2, 2**31),
    "tile": (*NO_INTEGER, 0, 10**6, 2**31),
    "seed": NO_INTEGER,
    "workspace_limit": (*(v for v in NO_INTEGER if v is not None), 0, 1),
    "limit": (*NO_FLOAT, 0, -1.0, -INF),
    "scale": (*NO_FLOAT, INF, -INF, 1e39),
    "rate": (*NO_FLOAT, INF, -INF, 1e39),
    **dict.fromkeys(("activation", "gate_up_layout", "scoring", "policy", "router"), NO_NAME),
    "renormalize": NO_FLAG,
    **dict.fromkeys(("deterministic", "main_grad"), (*NO_FLAG, None)),
}
LEGAL = {
    "limit": (INF, 1, 0.5), "scale": (-1, 0.0, 3), "seed": (0, 2**63 - 1, torch.tensor([5])),
    "workspace_limit": (None, 2**62), "renormalize": (None, True, False), "rate": (0, -1.5),
}  # fmt: skip


@pytest.mark.parametrize("operation", [name for name, op in OPERATIONS.items() if op.options])
def test_one_wrong_option(operation):
    op = OPERATIONS[operation]
    for option in op.options:
        for value in WRONG[option]:
            what = f"{operation}({option}={value!r})"
            arguments = op.arguments(Maker(0, torch.float32))
            with pytest.raises((RuntimeError, ValueError)) as error:
                op.call(**arguments | {option: value})
            assert_clear(error.value, operation.split(",")[0], option, what)
        for value in LEGAL.get(option, ()):
            op.call(**op.arguments(Maker(0, torch.float32)) | {option: value})


MODULE = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 6, "top_k": 2}
EXTENT = (*NO_INTEGER, 0, 2**31)
WRONG_MODULE = {
    **WRONG, **dict.fromkeys(MODULE, EXTENT), "top_k": WRONG["top_k"],
    **dict.fromkeys(("selection_bias", "bias", "router_bias"), (*NO_FLAG, None)),
    "dtype": (torch.float16, torch.float64, torch.int32, torch.complex64, torch.bool),
    # Larger tiles and smaller limits are for the call to refuse, which knows the number of tokens.
    "tile": (*NO_INTEGER, 0, 2**31),
    "workspace_limit": [v for v in NO_INTEGER if v is not None],
}  # fmt: skip
del WRONG_MODULE["rate"]


def test_the_module_refuses_options_when_it_is_made():
    for option, values in WRONG_MODULE.items():
        for value in values:
            what = f"MoE({option}={value!r})"
            with pytest.raises(ValueError) as error:
                sm.MoE(**MODULE | SIGMOID | {option: value})
            assert re.match(rf"MoE: {option}: expected .+, got .+", str(error.value)), what


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"num_groups": 2, "top_groups": 2}, "num_groups"),
        ({"selection_bias": True}, "selection_bias"),
        ({"scoring": "topk_softmax", "renormalize": False}, "renormalize"),
        (SIGMOID | {"num_groups": 3, "top_groups": 1, "top_k": 3}, "top_k"),
        (SIGMOID | {"num_groups": 4}, "num_groups"),
    ],
)
def test_the_module_refuses_options_that_do_not_go_together(options, argument):
    with pytest.raises(ValueError, match=f"MoE: {argument}: expected"):
        sm.MoE(**MODULE | options)


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
        for argument in ("logits", "bias", "x", "router_w", "router_b"):
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
    ids, weights = sm.route(logits, 1, scoring="sigmoid_topk", bias=bias, renormalize=False)
    assert (ids == 1).all()
    weights.sum().backward()
    assert bias.grad is None and logits.grad.abs().max() > 0
