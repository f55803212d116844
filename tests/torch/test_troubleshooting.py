"""docs/guide/troubleshooting.md: every message there is one that the library says."""

import re
from pathlib import Path

import pytest
import sonicmoe_cpp as sm
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docs/guide/troubleshooting.md").read_text()
# What stands in bold and code, on one line each.
MESSAGES = [
    " ".join(message.split()) for message in re.findall(r"\*\*`([^`]+)`\*\*", TEXT, re.DOTALL)
]
T, D, N, E, K = 16, 8, 4, 4, 2


def tensors():
    x, w1, w2 = torch.randn(T, D), torch.randn(E, 2 * N, D), torch.randn(E, D, N)
    return {"x": x, "w1": w1, "w2": w2}


def moe(**changes):
    routing = {"topk_ids": torch.randint(0, E, (T, K)), "topk_weights": torch.rand(T, K)}
    return sm.moe(**tensors() | routing | changes)


def moe_layer(**changes):
    given = tensors() | {"router_weight": torch.randn(E, D), "top_k": K}
    return sm.moe_layer(**given | changes)


def under_float16():
    with torch.autocast("cpu", dtype=torch.float16):
        moe_layer()


def sharded():
    class DTensor(torch.Tensor):
        placements = ()

    moe(w1=tensors()["w1"].as_subclass(DTensor))


def forward_mode():
    x = torch.randn(T, D)
    torch.func.jvp(lambda x: moe(x=x), (x,), (torch.ones_like(x),))


def twice():
    x = torch.randn(T, D, requires_grad=True)
    (grad,) = torch.autograd.grad(moe(x=x).square().sum(), x, create_graph=True)
    torch.autograd.grad(grad.sum(), x)


def main_grad_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moe_layer(main_grad=True)


def bias_with_gradient():
    rows = torch.zeros(E, dtype=torch.int32)
    sm.update_expert_bias_(torch.zeros(E, requires_grad=True), rows, 0.1)


def replaced_linear():
    transformers = pytest.importorskip("sonicmoe_cpp.integrations.transformers")
    transformers.replace_moe_blocks(torch.nn.Linear(2, 2))


# The beginning of a message -> who says it.
PROVOKED = {
    "MoE: activation": lambda: sm.MoE(D, N, E, K, activation="tanh"),
    "MoE: top_k": lambda: sm.MoE(D, N, E, E + 1),
    "MoE: num_groups": lambda: sm.MoE(D, N, E, K, num_groups=2),
    "MoE: selection_bias": lambda: sm.MoE(D, N, E, K, selection_bias=True),
    "MoE: dtype": lambda: sm.MoE(D, N, E, K, dtype=torch.float16),
    "MoE()": lambda: sm.MoE(D, N, E, K, nonsense=1),
    "moe_layer: x": under_float16,
    "moe_layer_forward: w1": lambda: moe_layer(w1=tensors()["w1"].bfloat16()),
    "moe_layer: router_weight": lambda: moe_layer(router_weight=torch.randn(E, D + 1)),
    "moe: topk_ids: expected int32": lambda: moe(topk_ids=torch.rand(T, K)),
    "moe: topk_ids: expected leading": lambda: moe(
        x=torch.randn(2, 8, D), topk_ids=torch.zeros(8, 2, K, dtype=torch.int64)
    ),
    "moe: w1": sharded,
    "moe_layer_forward: tile": lambda: moe_layer(router="token_rounding", tile=T + 1),
    "update_expert_bias_": bias_with_gradient,
    "...: forward-mode": forward_mode,
    "sonicmoe_cpp: double backward": twice,
    "moe_layer: main_grad": main_grad_under_autocast,
    "replace_moe_blocks": replaced_linear,
}
# Where it stands, for what needs a GPU, a broken installation or a model.
BINDINGS = "bindings/torch/sonicmoe_cpp"
HF = f"{BINDINGS}/integrations/transformers"
WRITTEN = {
    "sonicmoe_cpp: ... is missing": f"{BINDINGS}/_library.py",
    "sonicmoe_cpp.integrations": f"{HF}/__init__.py",
    "...: x: expected bfloat16": "src/cuda/hopper/reasons.cpp",
    "...: x: expected hidden_size": "src/cuda/hopper/reasons.cpp",
    "...: w1: expected 16-byte": "src/cuda/hopper/reasons.cpp",
    "CUDA out of memory": "bindings/torch/csrc/convert.cpp",
    "sonicmoe_cpp: ...act_fn": f"{HF}/activations.py",
    "..._apply_gate": f"{HF}/activations.py",
    "...gate: token_rounding": f"{HF}/families.py",
}


def message_that_begins(beginning):
    (message,) = [message for message in MESSAGES if message.startswith(beginning)]
    return message


def pattern(message):
    return ".*".join(re.escape(part) for part in message.split("..."))


@pytest.mark.parametrize("beginning", PROVOKED)
def test_the_library_says_what_the_page_says(beginning):
    with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
        PROVOKED[beginning]()
    said, message = str(error.value), message_that_begins(beginning)
    assert re.match(pattern(message), said, re.DOTALL), f"{message!r} is not {said!r}"


@pytest.mark.parametrize("beginning", WRITTEN)
def test_the_source_holds_what_the_page_says(beginning):
    """Its longest piece of words, without the names that the source fills in."""
    source = (REPOSITORY / WRITTEN[beginning]).read_text()
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals that go on in the next line
    pieces = re.split(
        r"\.\.\.|, got|[:.] |expected |hidden_size | 8 ", message_that_begins(beginning)
    )
    longest = max(pieces, key=len).strip()
    assert len(longest) > 8 and longest in source, longest


def test_every_message_of_the_page_is_tested():
    known = (*PROVOKED, *WRITTEN)
    assert [m for m in MESSAGES if not m.startswith(known)] == []
    assert len(MESSAGES) == len(known)


def test_another_message_would_be_noticed():
    assert not re.match(
        pattern("moe: w1: expected ..., got a DTensor"), "moe: w2: expected a, got b"
    )


def test_reasons_of_a_backend_are_the_sources():
    page = " ".join(TEXT.split())
    for reason, file in (
        ("built without CUDA (no nvcc was found)", "src/cuda/cuda.cmake"),
        ("no NVIDIA driver is installed", "src/cuda/device.cpp"),
        ("the NVIDIA driver serves CUDA ", "src/cuda/device.cpp"),
        (": update the driver", "src/cuda/device.cpp"),
        ("no usable GPU: ", "src/cuda/device.cpp"),
        (" GPUs has compute capability 9.0 (H100, H200), which the kernels are built for",
         "src/cuda/device.cpp"),
    ):  # fmt: skip
        assert reason.strip() in page and reason in (REPOSITORY / file).read_text()
