"""`sonicmoe memory --model`: a config.json is read or refused, and a plan adds up."""

import json

import pytest

QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


@pytest.fixture
def plan(sonicmoe, tmp_path):
    """Runs the command on a config.json with these fields."""

    def run(fields, *arguments, text=None):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields) if text is None else text)
        return sonicmoe("memory", "--model", path, *arguments)

    return run


@pytest.fixture
def planned(plan):
    def run(fields, *arguments):
        result = plan(fields, *arguments, "--json")
        assert (result.returncode, result.stderr) == (0, "")
        return json.loads(result.stdout)

    return run


def test_known_models_have_their_published_sizes(planned):
    qwen, deepseek = planned(QWEN3), planned(DEEPSEEK_V3)
    assert (qwen["parameters"] / 1e9, deepseek["parameters"] / 1e9) == (
        pytest.approx(30.5, rel=2e-3),
        pytest.approx(671, rel=1e-3),
    )
    assert deepseek["active_parameters"] / 1e9 == pytest.approx(37, rel=0.02)
    nested = planned({"model_type": "outer", "text_config": QWEN3})
    assert nested == qwen


def test_states_are_divided_by_fsdp_alone(planned):
    one = planned(QWEN3)["layout"]
    states = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")
    for fsdp, ep in ((8, 1), (8, 4), (4, 4)):
        part = planned(QWEN3, "--gpus", 8, "--fsdp", fsdp, "--ep", ep)["layout"]
        assert (part["fsdp"], part["ep"], part["expert_shards"]) == (fsdp, ep, fsdp // ep)
        assert [part[name] for name in states] == [one[name] // fsdp for name in states]
    narrow = planned(QWEN3, "--parameter-dtype", "bfloat16", "--optimizer-bytes", 2)["layout"]
    assert [2 * narrow["parameter_bytes"], 4 * narrow["optimizer_bytes"]] == [
        one["parameter_bytes"],
        one["optimizer_bytes"],
    ]


def test_a_plan_adds_up(planned):
    report = planned(QWEN3, "--gpus", 8, "--tokens", "8k")
    T, E, K, n, d = 8192, 128, 8, 768, 2048
    attention = 2 * d * (32 + 4) * 128 + 2 * d + E * d
    compute = 6 * T * (attention - 2 * d + 3 * K * n * d) / 500e12
    for row in report["layouts"]:
        ep = row["ep"]
        fixed = ("parameter", "gradient", "optimizer", "kept", "root")
        moments = ("gathered", "transient", "exchange")
        layer = sum(row[f"{name}_bytes"] for name in moments)
        total = sum(row[f"{name}_bytes"] for name in fixed) + max(layer, row["loss_bytes"])
        assert row["total_bytes"] == pytest.approx(total, abs=16)
        assert row["fits"] == (total <= 79 * 2**30)
        experts = 3 * E * n * d // ep
        assert row["gathered_bytes"] == 10 * (experts + attention)
        assert row["token_traffic_bytes"] == 4 * (ep - 1) * T * d * 2
        assert row["exchange_bytes"] == (3 * ep * T * d * 2 if ep > 1 else 0)
        moved = 8 * (experts * (1 - ep / 8) + attention * 7 / 8)
        assert row["weight_traffic_bytes"] == pytest.approx(moved, abs=2)
        assert row["tokens_over_compute"] == pytest.approx(
            row["token_traffic_bytes"] / 240e9 / compute, rel=1e-6
        )
    # Between hosts a rank has a fifth of the rate.
    wide = planned(QWEN3, "--gpus", 16, "--ep", 16)["layout"]
    seconds = wide["tokens_over_compute"] * compute
    assert wide["token_traffic_bytes"] / seconds == pytest.approx(45e9, rel=1e-6)


def test_what_is_kept_is_that_of_the_layers_command(planned, sonicmoe):
    """Of one layer more: the experts of `memory --shape`, and attention by hand."""
    less, more = (
        planned({**QWEN3, "num_hidden_layers": layers}, "--tokens", 1024)["layout"]["kept_bytes"]
        for layers in (4, 5)
    )
    layer = json.loads(sonicmoe("memory", "--shape", "1024,2048,768,128,8", "--json").stdout)
    heads = (32 + 4) * 128
    attention = 2 * (2048 * 8 + 4) + heads * 6 + 2 * 2 * heads + 4 * 32
    assert more - less == layer["sonicmoe"]["kept_bytes"] + 1024 * (attention + 4 * 128)


def test_checkpointing_and_a_loss_in_parts_need_less(planned):
    base = planned(QWEN3, "--gpus", 8)
    lean = planned(QWEN3, "--gpus", 8, "--checkpointing", "--loss-tokens", 1024)
    for fat, thin in zip(base["layouts"], lean["layouts"], strict=True):
        assert thin["kept_bytes"] < fat["kept_bytes"] / 8
        assert thin["loss_bytes"] * 8 == fat["loss_bytes"]
        assert thin["token_traffic_bytes"] * 2 == fat["token_traffic_bytes"] * 3


def test_the_advice(plan, planned):
    """Tokens are exchanged while nothing else runs, weights beside the products of their layer."""
    lean = ("--gpus", 8, "--checkpointing", "--loss-tokens", 1024)
    report = planned(QWEN3, *lean)
    rows = {row["ep"]: row for row in report["layouts"]}
    assert list(rows) == [1, 2, 4, 8] and all(row["fits"] for row in rows.values())
    in_the_open = {
        ep: row["tokens_over_compute"] + max(0.0, row["weights_over_compute"] - 1)
        for ep, row in rows.items()
    }
    assert report["layout"]["ep"] == min(in_the_open, key=in_the_open.get) == 2
    first = f"--ep 2 has the least traffic in the open, {in_the_open[2]:.2f} of compute; "
    second = f"--ep 1, the smallest that fits 79.0 GiB, has {in_the_open[1]:.2f} of compute"
    assert report["advice"] == first + second
    text = plan(QWEN3, *lean).stdout
    assert f"advice: {report['advice']}" in text and "experts over 2 ranks x 4 shards" in text
    # With so many tokens products hide all weights.
    many = planned(QWEN3, *lean, "--tokens", "64k", "--gpu", "1TB")
    assert many["layout"]["ep"] == 1 and many["advice"].startswith("--ep 1, the smallest that")
    # Too small a GPU.
    small = planned(QWEN3, *lean, "--gpu", "8GiB")
    least = min(row["total_bytes"] for row in small["layouts"])
    assert small["advice"].startswith("nothing fits 8.00 GiB: the least is")
    assert small["layout"]["total_bytes"] == least


def test_layers_without_experts(planned):
    dense = {**QWEN3, "num_hidden_layers": 6}
    all_sparse = planned(dense)["parameters"]
    each = 3 * 2048 * (128 * 768 - 6144) + 128 * 2048  # what one layer has less
    for fields, count in (
        ({"mlp_only_layers": [0, 5]}, 2),
        ({"decoder_sparse_step": 2}, 3),
        ({"first_k_dense_replace": 1, "mlp_only_layers": [0, 1]}, 2),
        ({"mlp_layer_types": ["dense"] + ["sparse"] * 5}, 1),
        ({"num_dense_layers": 2}, 2),
    ):
        assert all_sparse - planned({**dense, **fields})["parameters"] == count * each


def test_shared_experts_under_all_their_names(planned):
    plain = planned(QWEN3)["parameters"]
    for fields, width in (
        ({"num_shared_experts": 2}, 2 * 768),
        ({"shared_intermediate_size": 1024}, 1024),
        ({"shared_intermediate_size": 1024, "n_shared_experts": 1}, 1024),
        ({"shared_intermediate_size": 0}, 0),
    ):
        assert planned({**QWEN3, **fields})["parameters"] - plain == 48 * 3 * 2048 * width
    dense = {**QWEN3, "num_dense_layers": 1}
    wider = planned({**dense, "prefix_dense_intermediate_size": 6145})["parameters"]
    assert wider - planned(dense)["parameters"] == 3 * 2048


def test_kinds_of_attention_change_no_count(planned):
    kinds = ["sliding_attention", "full_attention"] * 24
    listed = {**QWEN3, "layer_types": kinds, "attn_type_list": [1] * 48}
    assert planned(listed) == planned(QWEN3)


def test_copies_of_the_model_reduce_their_gradients(planned):
    """HSDP: shards within a host, copies between hosts."""
    E, n, d = 128, 768, 2048
    layer = 3 * E * n * d + 2 * d * (32 + 4) * 128 + 2 * d + E * d
    for ep in (1, 4):
        one, four = (
            planned(QWEN3, "--gpus", gpus, "--fsdp", 8, "--ep", ep)["layout"] for gpus in (8, 32)
        )
        moved = 4 * layer / 8 * 2 * 3 / 4
        more = four["weight_traffic_bytes"] - one["weight_traffic_bytes"]
        assert more == pytest.approx(moved, abs=2)
        # All else crosses NVLink as before.
        seconds = one["weight_traffic_bytes"] / 240e9
        assert four["weights_over_compute"] / one["weights_over_compute"] == pytest.approx(
            (seconds + moved / 45e9) / seconds, rel=1e-6
        )


REFUSED = [
    ({"hidden_size": "8"}, 'hidden_size: expected an integer from 1 to 2147483647, got ""8""'),
    ({"hidden_size": 0}, "hidden_size: expected an integer from 1"),
    ({"hidden_size": 2.5}, 'got "2.5"'),
    ({"hidden_size": 2**63}, "hidden_size: expected"),
    ({"vocab_size": [[[1]]]}, 'vocab_size: expected an integer from 1 to 2147483647, got "array"'),
    ({"num_experts_per_tok": 129}, "num_experts_per_tok: expected at most the 128 experts"),
    ({"num_experts_per_tok": None}, "num_experts_per_tok or moe_k, got"),
    ({"num_experts": None}, "num_experts or num_local_experts or n_routed_experts"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false"),
    ({"mlp_only_layers": [48]}, "mlp_only_layers: expected a list of layers from 0 to 47"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers: expected at most 100000"),
    ({"first_k_dense_replace": 48}, "expected a model with experts in some layer"),
    ({"mlp_layer_types": ["dense"]}, "mlp_layer_types: expected a list of dense or sparse for 48"),
    ({"mlp_layer_types": [1] * 48}, 'sparse for 48 layers, got "array"'),
    ({"mamba_d_state": 16}, "mamba_d_state: expected no such field: layers of attention and exp"),
    ({"layer_types": ["full_attention", "conv"]}, "layer_types: expected a list of kinds of atten"),
    ({"layer_types": ["linear_attention"]}, 'none linear, got ""linear_attention""'),
    ({"layer_types": ["minimax_m3_sparse"]}, 'none linear, got ""minimax_m3_sparse""'),
    ({"layer_types": [[1]]}, 'none linear, got "array"'),
    ({"layer_types": "full_attention"}, "layer_types: expected a list of kinds of attention"),
    ({"attn_type_list": [1, 0]}, "attn_type_list: expected a list of 1, no linear attention, got"),
    ({"num_dense_layers": 48}, "expected a model with experts in some layer"),
    ({"num_shared_experts": -1}, "num_shared_experts: expected an integer from 0"),
    ({"moe_layer_freq": 2}, 'moe_layer_freq: expected 1, got "2"'),
    ({"kv_lora_rank": 512}, "qk_rope_head_dim: expected"),
    ({"hidden_size": 2**31 - 1, "moe_intermediate_size": 2**31 - 1}, "bytes stay below 2^62"),
]


@pytest.mark.parametrize(("fields", "expected"), REFUSED)
def test_a_wrong_field_is_one_line(plan, refused, fields, expected):
    refused(plan({**QWEN3, **fields}), "--model: ", expected)


def test_a_file_that_is_no_config_is_one_line(plan, sonicmoe, refused, tmp_path):
    for text in ("", "[]", "{", "nul", "\xff"):
        refused(plan({}, text=text), "--model: expected a file with one JSON object")
    refused(plan({}, text='{"hidden_size": ' + "[" * 100000 + "]" * 100000 + "}"), "hidden_size")
    refused(sonicmoe("memory", "--model", tmp_path), "--model: expected a config.json")
    refused(sonicmoe("memory", "--model", "/dev/zero"), "--model: expected a config.json")


def test_layouts_that_cannot_be(plan, refused):
    refused(plan(QWEN3, "--gpus", 8, "--fsdp", 3), "--fsdp: expected a number that divides the 8 G")
    refused(plan(QWEN3, "--gpus", 8, "--ep", 3), "--ep: expected a number that divides the 8 ranks")
    refused(plan(QWEN3, "--gpus", 256, "--ep", 256), "--ep: expected", "128 experts")
