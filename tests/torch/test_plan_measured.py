"""`sonicmoe memory --model` beside models of transformers: parameters, and what forward keeps."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import sonicmoe_cpp.integrations.transformers as hf
import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks

COMMAND = Path(
    os.environ.get("SONICMOE_CLI", Path(__file__).parents[2] / "build" / "cli" / "sonicmoe")
)
pytestmark = pytest.mark.skipif(not COMMAND.is_file(), reason="the command is not built")

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 4,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
}
# Without attention of a fused kernel gpt-oss keeps its probabilities: only its parameters count.
MODELS = {
    "Qwen3Moe": {"head_dim": 64, "moe_intermediate_size": 96, "num_experts": 16},
    "Mixtral": {"intermediate_size": 256, "num_local_experts": 8},
    "Olmoe": {"intermediate_size": 96, "num_experts": 16, "eos_token_id": 1},
    "DeepseekV3": {
        **LATENT, "intermediate_size": 512, "moe_intermediate_size": 96, "n_routed_experts": 16,
        "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    },
    "GptOss": {"head_dim": 64, "intermediate_size": 96, "num_local_experts": 16},
}  # fmt: skip
TOKENS = 512


def config_of(name, **changes):
    return getattr(transformers, f"{name}Config")(**(SIZES | MODELS[name] | changes))


def plan_of(config, tmp_path, *arguments):
    path = tmp_path / "config.json"
    config.to_json_file(path)
    command = [COMMAND, "memory", "--model", path, *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def bytes_kept(model):
    """Distinct storages that autograd is handed in one forward, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randint(SIZES["vocab_size"], (1, TOKENS)), use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_the_models(name, tied, tmp_path):
    """Of full width, where biases and norms of heads are what they are beside the rest."""
    full = getattr(transformers, f"{name}Config")(num_hidden_layers=4, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(full)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert plan_of(full, tmp_path)["parameters"] == pytest.approx(count, rel=5e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "GptOss"])
def test_kept_bytes_within_five_percent(name, tmp_path):
    config = config_of(name)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    hf.replace_moe_blocks(model)
    plan = plan_of(config, tmp_path, "--tokens", TOKENS)["layout"]
    assert plan["kept_bytes"] == pytest.approx(bytes_kept(model), rel=0.05)
