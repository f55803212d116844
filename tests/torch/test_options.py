"""One option at a time made wrong: each is refused by its name, by functions and by the module."""

import dataclasses
import inspect
import json
import math
import re
from typing import get_args, get_type_hints

import pytest
import sonicmoe_cpp as sm
import torch
from operations import OPERATIONS, SIGMOID, Maker, assert_clear
from sonicmoe_cpp import options

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


def test_packed_options_are_json():
    """In which AOTInductor keeps them: it has no infinity."""
    for limit in (0.5, 1e39, INF):
        packed = options.packed_experts("moe", activation="swiglu_clamped", limit=limit)
        _, (kept,) = json.loads(json.dumps(packed, allow_nan=False))
        assert kept == min(limit, torch.finfo(torch.float32).max)


MODULE = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 6, "top_k": 2}
EXTENT = (*NO_INTEGER, 0, 2**31)
WRONG_MODULE = {
    **WRONG, **dict.fromkeys(MODULE, EXTENT), "top_k": WRONG["top_k"],
    **dict.fromkeys(("selection_bias", "expert_bias", "router_bias"), (*NO_FLAG, None)),
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


# ------------------------------------------------------------------------------------- the values

FUNCTIONS = {
    "moe": sm.moe, "moe_sorted": sm.moe_sorted, "moe_pairs": sm.moe_pairs, "route": sm.route,
    "round_tokens": sm.round_tokens, "moe_layer": sm.moe_layer, "MoE": sm.MoE.__init__,
}  # fmt: skip


def keywords_of(function):
    """The names that the TypedDict of a function's options gives to type checkers."""
    (keywords,) = get_args(get_type_hints(function)["options"])
    return get_type_hints(keywords)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_show_what_type_checkers_see(name):
    """The same names, with the types and the defaults of the dataclasses."""
    function = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    explicit = inspect.unwrap(function).__code__
    named = explicit.co_varnames[: explicit.co_argcount + explicit.co_kwonlyargcount]
    assert set(parameters) == {*named, *keywords_of(function)}
    fields = {}
    for cls in (options.RoutedExpertOptions, options.RouterOptions, options.RoundingOptions):
        hints = get_type_hints(cls)
        fields |= {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls)}
    for keyword, kind in keywords_of(function).items():
        expected, default = fields.get(keyword, (str, "topk"))
        assert kind == expected and parameters[keyword].default == default, keyword


@pytest.mark.parametrize(
    ("function", "former", "name"),
    [
        ("route", "bias", "selection_bias"), ("round_tokens", "bias", "selection_bias"),
        ("moe_layer", "bias", "selection_bias"), ("moe_layer", "router_b", "router_bias"),
        ("MoE", "bias", "expert_bias"),
    ],
)  # fmt: skip
def test_a_former_keyword_names_its_successor(function, former, name):
    given = {former: None}
    with pytest.raises(TypeError, match=f"{function}.. got .+ argument '{former}': .+ '{name}'"):
        if function == "MoE":
            sm.MoE(**MODULE, **given)
        else:
            operation = OPERATIONS[function]
            operation.call(**operation.arguments(Maker(0, torch.float32)), **given)


def test_unknown_keywords_are_type_errors():
    for function in ("moe", "moe_sorted", "moe_pairs", "route", "round_tokens", "moe_layer"):
        operation = OPERATIONS[function]
        arguments = operation.arguments(Maker(0, torch.float32))
        with pytest.raises(TypeError, match=f"{function}.. got an unexpected .+ 'nonsense'$"):
            operation.call(**arguments, nonsense=1)


def test_options_are_values():
    """Equal, hashable, frozen, and the same after a way through the packed form."""
    layer = options.layer_options(
        "test", 6, False, router="token_rounding", top_k=3, scoring="sigmoid_topk", num_groups=3,
        top_groups=2, renormalize=False, scale=-0.5, activation="geglu", workspace_limit=9,
        deterministic=False, tile=7, policy="balanced", seed=2**63 - 1, limit=2,
    )  # fmt: skip
    for value in (layer, dataclasses.replace(layer, rounding=None)):
        integers, reals = value.pack()
        left = iter(integers), iter(reals)
        assert options.LayerOptions.unpack(*left) == value and hash(value)
        assert not list(left[0]) and not list(left[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.experts.limit = 1.0
    with pytest.raises(ValueError, match="ExpertOptions: limit: expected a positive number"):
        dataclasses.replace(layer.experts, limit=-1.0)
