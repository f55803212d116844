"""The model, Qwen3-MoE of transformers, and its loss; where it can run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from .config import TrainConfig, UserError

EMBEDDING_STD = 0.5


def model_config(config: TrainConfig, vocab_size: int, end_of_text: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.hidden_size // config.heads,
        moe_intermediate_size=config.intermediate_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=config.seq_len,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        router_aux_loss_coef=config.aux_coef / config.top_k,  # transformers' loss is K times ours
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )


def new_model(config: TrainConfig, vocab_size: int, end_of_text: int) -> Qwen3MoeForCausalLM:
    """Random weights, a function of the seed; the same for every --experts."""
    torch.manual_seed(config.seed)
    model = Qwen3MoeForCausalLM(model_config(config, vocab_size, end_of_text))
    # transformers' 0.02 lets the first layers drown the token in the residual stream: with wider
    # embeddings the default run ends at 61% of the unigram cross-entropy instead of 67%.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
    return model


def choose_device(config: TrainConfig) -> torch.device:
    """The GPU counts only where the experts can run on it. ImportError where the package of
    --experts is not built."""
    if config.experts == "sonicmoe_cpp":
        import sonicmoe_cpp  # noqa: F401
    usable = torch.cuda.is_available() and _experts_run_on_gpu(config)
    if config.device == "cuda" and not usable:
        reason = "torch sees no GPU here"
        if torch.cuda.is_available():
            reason = _why_not_on_gpu(config)
        raise UserError(f"--device cuda: {reason}")
    if config.device == "auto":
        return torch.device("cuda" if usable else "cpu")
    return torch.device(config.device)


def _experts_run_on_gpu(config: TrainConfig) -> bool:
    return not _why_not_on_gpu(config)


def _why_not_on_gpu(config: TrainConfig) -> str:
    """Empty where the experts of this run can be computed on the GPU."""
    if config.experts != "sonicmoe_cpp":
        return ""
    if config.dtype == "float32":
        return "sonicmoe_cpp computes in bfloat16 there (--dtype bfloat16)"
    if config.hidden_size % 8 or config.intermediate_size % 8:
        return "sonicmoe_cpp takes widths there that are multiples of 8"
    import sonicmoe_cpp

    cuda = next((b for b in sonicmoe_cpp.backends() if b.name == "cuda"), None)
    if cuda is None:
        return "this build of sonicmoe_cpp has no CUDA backend"
    return "" if cuda.available else f"sonicmoe_cpp: {cuda.reason}"


def autocast(config: TrainConfig, device: torch.device):
    if config.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def summed_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Nats of all tokens: hidden [..., d], head [V, d], targets [...]."""
    logits = F.linear(hidden, head).float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


def cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    rows: int = 0,
    summed: Callable[..., torch.Tensor] = summed_cross_entropy,
) -> torch.Tensor:
    """Nats per token. With `rows` the logits of so many tokens exist at a time, in backward too."""
    if not rows:
        logits = F.linear(hidden, head).float()
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    parts = zip(hidden.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True)
    total = sum(
        checkpoint(summed, h, head, t, use_reentrant=False, preserve_rng_state=False)
        for h, t in parts
    )
    return total / targets.numel()


def sample_text(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    tokens: int,
    seed: int,
    temperature: float = 0.8,
) -> str:
    """The prompt and what the model, in eval(), writes after it: `tokens` more, drawn from the 50
    likeliest. An empty prompt begins a new text. Leaves torch's random state as it was."""
    ids = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt").input_ids.to(model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = model.generate(
            ids,
            do_sample=True,
            temperature=temperature,
            top_k=50,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=tokenizer.eos_token_id,
            attention_mask=torch.ones_like(ids),
        )
    return tokenizer.decode(written[0])
