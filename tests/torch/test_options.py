"""One option at a time made wrong: each is refused by its name, by functions and by the module."""

import math
import re

import pytest
import sonicmoe_cpp as sm
import torch
from operations import OPERATIONS, SIGMOID, Maker, assert_clear

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
