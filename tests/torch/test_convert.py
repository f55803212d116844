"""State dicts of other layers: the same numbers at other places, and the same outputs."""

import hf_models
import pytest
import sonicmoe_cpp as sm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sonicmoe_cpp import convert

SIZES = {"hidden_size": 24, "intermediate_size": 16, "num_experts": 6, "top_k": 2}
LAYERS = {  # format: options of a layer that has everything the format has a place for
    "sonic-moe": {"expert_bias": True},
    "transformers": {"selection_bias": True, "scoring": "sigmoid_topk"},
    "transformers-list": {"selection_bias": True, "scoring": "sigmoid_topk"},
    "mixtral": {},
    "gpt-oss": {"router_bias": True, "expert_bias": True, "activation": "swiglu_clamped"},
}
UNGATED = ("sonic-moe", "transformers", "transformers-list")


def layer_of(format, **options):
    layer = sm.MoE(**SIZES | LAYERS[format] | options)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.normal_()
    return layer


def same_bits(got, expected):
    assert got.keys() == expected.keys()
    for key in expected:
        assert got[key].dtype == expected[key].dtype
        assert torch.equal(got[key], expected[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("format", convert.FORMATS)
def test_round_trip(format, layout, dtype):
    layer = layer_of(format, gate_up_layout=layout, dtype=dtype)
    theirs = convert.export_state_dict(layer, format, prefix="a.b.")
    assert all(key.startswith("a.b.") and t.is_contiguous() for key, t in theirs.items())
    assert sum(t.numel() for t in theirs.values()) == sum(
        t.numel() for t in layer.state_dict().values()
    )
    ours = convert.import_state_dict(layer, theirs | {"b.c": layer.experts.w1}, format, "a.b.")
    same_bits(ours, layer.state_dict())


@pytest.mark.parametrize("format", UNGATED)
def test_round_trip_without_gate(format):
    layer = layer_of(format, activation="relu_squared")
    theirs = convert.export_state_dict(layer, format)
    same_bits(convert.import_state_dict(layer, theirs, format), layer.state_dict())


@pytest.mark.parametrize("format", convert.FORMATS)
def test_what_is_exported_can_be_saved(format, tmp_path):
    theirs = convert.export_state_dict(layer_of(format), format)
    save_file(theirs, tmp_path / "layer.safetensors")
    same_bits(load_file(tmp_path / "layer.safetensors"), theirs)


OUTER = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "reglu": lambda gate, up: F.relu(gate) * up,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "relu_squared": lambda h: F.relu(h) ** 2,
}


def official(x, state, top_k, activation):
    """The layer of sonic-moe by its definition: the softmax of the K largest logits weighs K
    experts; gated ones have the gate in the even rows of c_fc, the up projection in the odd."""
    largest, ids = F.linear(x, state["router.weight"]).topk(top_k, dim=-1)
    weights = largest.softmax(dim=-1)
    y = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            h = state["c_fc.weight"][expert] @ x[token] + state["c_fc.bias"][expert]
            gated = activation in ("swiglu", "geglu", "reglu")
            a = OUTER[activation](h[0::2], h[1::2]) if gated else OUTER[activation](h)
            out = state["c_proj.weight"][expert] @ a + state["c_proj.bias"][expert]
            y[token] += weight * out
    return y


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("activation", OUTER)
def test_the_official_layer(activation, layout):
    E, d, n = SIZES["num_experts"], SIZES["hidden_size"], SIZES["intermediate_size"]
    columns = 2 * n if activation in ("swiglu", "geglu", "reglu") else n
    state = {
        "router.weight": torch.randn(E, d),
        "c_fc.weight": torch.randn(E, columns, d),
        "c_fc.bias": torch.randn(E, columns),
        "c_proj.weight": torch.randn(E, d, n),
        "c_proj.bias": torch.randn(E, d),
    }
    options = {"activation": activation, "gate_up_layout": layout, "scoring": "topk_softmax"}
    layer = sm.MoE(**SIZES, **options, expert_bias=True)
    layer.load_state_dict(convert.import_state_dict(layer, state, "sonic-moe"))
    x = torch.randn(9, d)
    hf_models.same(layer(x), official(x, state, SIZES["top_k"], activation))
    same_bits(convert.export_state_dict(layer, "sonic-moe"), state)


def test_a_checkpoint_keeps_its_dtype_and_the_layer_may_have_no_memory():
    state = convert.export_state_dict(layer_of("mixtral", dtype=torch.bfloat16), "mixtral")
    layer = layer_of("mixtral", device="meta")
    made = convert.import_state_dict(layer, state, "mixtral")
    assert {(tensor.dtype, tensor.device.type) for tensor in made.values()} == {
        (torch.bfloat16, "cpu")
    }


def change(state, key, value):
    return {name: tensor for name, tensor in (state | {key: value}).items() if tensor is not None}


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("c_proj.weight", None, r"a\.c_proj\.weight: expected a tensor of shape \[6, 24, 16\]"),
        ("c_proj.bias", None, r"a\.c_proj\.bias: expected .*, got no such key"),
        ("router.weight", torch.ones(24, 6), r"a\.router\.weight: expected .*\[6, 24\], got .*24"),
        ("c_fc.weight", "text", r"a\.c_fc\.weight: expected a tensor .*, got 'text'"),
        ("c_fc.bias", torch.ones(6, 32, dtype=torch.int8), r"a\.c_fc\.bias: .*got .* torch.int8"),
        ("c_gate.weight", torch.ones(1), r"a\.c_gate\.weight: expected only the keys"),
    ],
)
def test_what_does_not_fit_is_named(key, value, message):
    layer = layer_of("sonic-moe")
    state = change(convert.export_state_dict(layer, "sonic-moe"), key, value)
    state = {f"a.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(ValueError, match=f"^import_state_dict: {message}"):
        convert.import_state_dict(layer, state, "sonic-moe", prefix="a.")


def test_keys_that_are_ignored_are_named_by_the_caller():
    layer = layer_of("mixtral")
    state = convert.export_state_dict(layer, "mixtral", "a.") | {"a.shared.w1": torch.ones(3)}
    with pytest.raises(ValueError, match=r"a\.shared\.w1"):
        convert.import_state_dict(layer, state, "mixtral", "a.")
    made = convert.import_state_dict(layer, state, "mixtral", "a.", ignore=["shared."])
    same_bits(made, layer.state_dict())


@pytest.mark.parametrize(
    "format, options, message",
    [
        ("safetensors", {}, "format: expected one of sonic-moe, .*, got 'safetensors'"),
        ("sonic-moe", {"router_bias": True}, r"router\.bias: expected none.*got \[6\]"),
        ("transformers", {"expert_bias": True}, r"experts\.b1: expected none"),
        ("mixtral", {"activation": "silu"}, r"experts\.w1: expected none.*got \[6, 16, 24\]"),
    ],
)
def test_what_a_format_has_no_place_for(format, options, message):
    layer = sm.MoE(**SIZES, **options)
    with pytest.raises(ValueError, match=f"^export_state_dict: {message}"):
        convert.export_state_dict(layer, format)
    with pytest.raises(ValueError, match=f"^import_state_dict: {message}"):
        convert.import_state_dict(layer, {}, format)
