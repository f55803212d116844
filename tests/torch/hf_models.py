"""Models of transformers, small and random, and how two of them compare."""

import copy

import torch
import transformers

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 8,
            "moe_intermediate_size": 24,
            "head_dim": 8,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 8, "intermediate_size": 24}),
    "mixtral": (
        "MixtralForCausalLM",
        {"num_local_experts": 8, "intermediate_size": 24},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {"num_local_experts": 8, "intermediate_size": 24, "head_dim": 8},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 24,
            "intermediate_size": 48,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}


def build(family, **changes):
    name, options = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **(COMMON | options | changes))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = getattr(transformers, name)(config)
    with torch.no_grad():  # realistic magnitudes: the initial 0.02 makes every expert nearly zero
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model.train()


def tokens():
    return torch.randint(3, 64, (2, 16))


def outputs(model, ids, **options):
    model.zero_grad()
    out = model(ids, labels=ids, **options)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(ours, theirs, tolerance=2e-4):
    assert theirs.abs().max() > 0 and ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def compare(ours, theirs):
    (out, grads), (expected, expected_grads) = ours, theirs
    same(out.logits, expected.logits)
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        if expected_grads[name].abs().max() > 0:
            same(grads[name], expected_grads[name])
        else:
            assert (grads[name] == 0).all()


def exact(model):
    """The same model in float64."""
    return copy.deepcopy(model).double()


def moe_blocks(model):
    """Its sparse blocks, replaced or not, whatever wraps their children."""
    return [m for m in model.modules() if hasattr(m, "experts") and router_name(m)]


def router_name(block):
    return next((name for name in ("gate", "router") if name in dict(block.named_children())), None)


def router_of(block):
    return getattr(block, router_name(block))


def put(situation, model):
    return [situation(block) for block in moe_blocks(model)]


def fused(model):
    """For each replaced block, whether its next forward is the fused layer."""
    return [block.why_called() is None for block in moe_blocks(model)]
