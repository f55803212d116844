"""Size, work and memory of a model in training, by formula, before anything is allocated.

The Mixture-of-Experts part is that of `sonicmoe memory`; around it stand attention, norms, loss and
optimizer as transformers' Qwen3-MoE computes them without torch.compile. Bytes unless said
otherwise; d, n, E, K, V, T: hidden size, width of an expert, experts, experts per token,
vocabulary, tokens of a microbatch; P = T * K rows (more with token rounding).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
from pathlib import Path

from .config import TrainConfig

MIB, GIB = 1 << 20, 1 << 30
WORKSPACE = 32 * MIB  # cuBLAS's, on Hopper


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a trainer keeps its numbers, in bytes per parameter or element."""

    state: float  # per parameter, all the time: weight, master weight, Adam's moments
    gradient: float  # per parameter, from its backward to the optimizer's step
    cast: int  # per parameter, from forward to backward: copies that autocast makes
    element: int  # of the products' inputs
    residual: int  # of the stream between the layers
    logit_rows: int  # tokens whose logits exist at a time; 0: all
    optimizer: int = 0  # transient during the optimizer's step


# trainer.train: float32 parameters, bfloat16 under autocast.
AUTOCAST = Layout(state=12, gradient=4, cast=2, element=2, residual=4, logit_rows=0)
FLOAT32 = Layout(state=12, gradient=4, cast=0, element=4, residual=4, logit_rows=0)


def layout_of(config: TrainConfig) -> Layout:
    layout = AUTOCAST if config.dtype == "bfloat16" else FLOAT32
    if config.accumulate == 1:
        return layout
    # The gradients of one batch stay while the next is computed.
    return dataclasses.replace(layout, state=layout.state + layout.gradient, gradient=0)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Counts of parameters."""

    experts: int  # of one layer
    attention: int  # of one layer: projections, norms, router
    embedding: int
    head: int
    layers: int
    total: int
    active: int  # in products for one token: no embedding, K of E experts


def parameters(config: TrainConfig, vocab_size: int) -> Parameters:
    d, experts = config.hidden_size, 3 * config.hidden_size * config.intermediate_size
    head_size = d // config.heads
    products = 4 * d * d + config.num_experts * d
    other = products + 2 * d + 2 * head_size
    layer = other + config.num_experts * experts
    vocabulary = vocab_size * d
    return Parameters(
        experts=config.num_experts * experts,
        attention=other,
        embedding=vocabulary,
        head=vocabulary,
        layers=config.layers,
        total=config.layers * layer + 2 * vocabulary + d,
        active=config.layers * (products + config.top_k * experts) + vocabulary,
    )


def flops_per_token(config: TrainConfig, vocab_size: int) -> float:
    """Model FLOPs of one training step per token: 6 per active parameter, and causal attention.

    Attention: two products of 2 S A FLOPs per token forward (S length of the sequence, A width of
    all heads), half of them masked, and twice that backward: 6 S A per layer. Rows that rounding
    adds, padding and recomputation do not count.
    """
    attention = 6 * config.layers * config.seq_len * config.hidden_size
    return 6.0 * parameters(config, vocab_size).active + attention


def rows(config: TrainConfig, tokens: int) -> int:
    """P: rows the experts have room for."""
    pairs = tokens * config.top_k
    if config.router != "token-rounding" or config.policy == "down":
        return pairs
    if config.policy == "balanced":
        return pairs + config.tile // 2
    per_expert = config.tile // 2 if config.policy == "nearest" else config.tile - 1
    return pairs + config.num_experts * per_expert


def moe_element(config: TrainConfig, layout: Layout) -> int:
    """torch's grouped_mm takes no part in autocast: it runs in the parameters' type."""
    return 4 if layout.cast and config.experts != "sonicmoe_cpp" else layout.element


def moe_kept(config: TrainConfig, layout: Layout, tokens: int) -> int:
    """Of one layer from forward to backward, beside its input X."""
    p, n, experts = rows(config, tokens), config.intermediate_size, config.num_experts
    element = moe_element(config, layout)
    if config.experts != "sonicmoe_cpp":
        # Gathered rows and Y [P, d]; H [P, 2n], silu and A [P, n]; orders; router's probabilities.
        # transformers' loop: the weighted rows too, whose sizes index_add's backward asks for.
        wide = 3 if config.experts == "eager" else 2
        each = element * (wide * config.hidden_size + 4 * n) + 24
        return p * each + tokens * (12 * experts + 16 * config.top_k)
    if config.router == "token-rounding":
        metadata = 4 * (experts + 4 * p + tokens + 1) + 12 * p + 4 * tokens * config.top_k
    else:
        metadata = 4 * (experts + 3 * p) + 8 * p
    return p * element * 2 * n + metadata + 4 * tokens * experts


def moe_transient(config: TrainConfig, layout: Layout, tokens: int) -> int:
    """Of one layer's backward, with dO and dX."""
    element = moe_element(config, layout)
    p, d, n = rows(config, tokens), config.hidden_size, config.intermediate_size
    around = 2 * tokens * d * element
    if config.experts == "eager":  # each expert's gradient of gate_up comes in a tensor of all
        return config.num_experts * 2 * n * d * element + around
    if config.experts != "sonicmoe_cpp":
        return p * element * (3 * d + 3 * n) + around
    return p * element * max(3 * n, d) + around  # dH and A'; then dX~, with dH in H's place


def moe_forward_transient(config: TrainConfig, layout: Layout, tokens: int) -> int:
    """Of one layer's forward in this library, with its output: A and Y."""
    if config.experts != "sonicmoe_cpp":
        return 0  # it keeps both
    element = moe_element(config, layout)
    d, n = config.hidden_size, config.intermediate_size
    return element * (rows(config, tokens) * (n + d) + tokens * d)


def layer_other_kept(config: TrainConfig, layout: Layout, tokens: int) -> int:
    """Attention and norms of one layer from forward to backward; X of the experts included."""
    d, m = config.hidden_size, layout.element
    norm = d * (4 + layout.residual + m) + 4  # input in float32, normalised, result; 1/rms
    head_norm = d * (4 + m) + 4 * config.heads
    attention = 4 * m * d + 4 * config.heads  # q, k, v, output; logsumexp
    if layout.cast:
        attention += 2 * m * d  # q, k and v each cast their input: autocast remembers weights only
    return tokens * (2 * norm + 2 * head_norm + attention)


def loss_transient(config: TrainConfig, layout: Layout, vocab_size: int, tokens: int) -> int:
    """Float32 log-probabilities and two gradients of that size, and the logits' own gradient."""
    alive = min(layout.logit_rows or tokens, tokens)
    return alive * vocab_size * (12 + (layout.element if layout.logit_rows else 0))


def peak(config: TrainConfig, layout: Layout, vocab_size: int, sequences: int) -> dict[str, int]:
    """The largest of the moments of a step, and what it is made of."""
    tokens = sequences * config.seq_len
    count = parameters(config, vocab_size)
    kept = {
        "moe": config.layers * moe_kept(config, layout, tokens),
        "other": config.layers * layer_other_kept(config, layout, tokens)
        + tokens * config.hidden_size * (4 + layout.residual + layout.element),
    }
    states = count.total * layout.state
    of_layer = count.experts + count.attention
    vocabulary = (count.head + count.embedding) * layout.gradient
    activations = sum(kept.values()) + count.total * layout.cast
    transient = moe_transient(config, layout, tokens)
    moments = {
        "last layer's forward": activations + moe_forward_transient(config, layout, tokens),
        "loss": activations + loss_transient(config, layout, vocab_size, tokens),
        "last layer's backward": activations
        + transient
        + (count.head + of_layer) * layout.gradient,
        "first layer's backward": activations // config.layers
        + transient
        + (count.head + config.layers * of_layer) * layout.gradient,
        "optimizer": config.layers * of_layer * layout.gradient + vocabulary + layout.optimizer,
    }
    moment = max(moments, key=moments.get)
    return {
        "states": states,
        "moe_kept": kept["moe"],
        "other_kept": kept["other"],
        "moment": moment,
        "at_the_moment": moments[moment],
        "peak": states + moments[moment] + WORKSPACE,
    }


def largest_microbatch(
    config: TrainConfig, layout: Layout, vocab_size: int, capacity: int, most: int = 4096
) -> int:
    """Sequences of the largest microbatch whose peak is within `capacity`; 0 where none is."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = peak(config, layout, vocab_size, middle)["peak"] <= capacity
        low, high = (middle, high) if fits else (low, middle)
    return low


def memory_command(
    config: TrainConfig, layout: Layout, vocab_size: int, sequences: int, capacity: int
) -> list[str]:
    """The call of `sonicmoe memory` that counts this model, all of it; for this library's experts.

    What is not of the experts goes into --other-bytes-per-token where it grows with the tokens,
    else into --other-bytes: at these sequences the total is that of peak().
    """
    tokens, d, experts = sequences * config.seq_len, config.hidden_size, config.num_experts
    per_token = config.layers * (
        layer_other_kept(config, layout, tokens) // tokens - layout.element * d + 4 * experts
    ) + d * (4 + layout.residual + layout.element)
    topk = dataclasses.replace(config, router="topk")
    each = parameters(config, vocab_size).experts * layout.state + layout.element * tokens * d
    kept = moe_kept(topk, layout, tokens) - 4 * tokens * experts
    moe = config.layers * (each + kept)
    moe += max(
        transient(topk, layout, tokens) for transient in (moe_forward_transient, moe_transient)
    )
    whole = peak(config, layout, vocab_size, sequences)["peak"]
    shape = (tokens, d, config.intermediate_size, experts, config.top_k)
    options = {
        "--shape": ",".join(map(str, shape)),
        "--layers": config.layers,
        "--dtype": "float32" if layout.element == 4 else "bfloat16",
        "--parameter-bytes": layout.state,
        "--other-bytes": max(0, whole - moe - per_token * tokens),
        "--other-bytes-per-token": per_token,
        "--gpu": capacity,
    }
    return ["sonicmoe", "memory", *(str(item) for pair in options.items() for item in pair)]


def layers_that_fit(
    config: TrainConfig,
    layout: Layout,
    vocab_size: int,
    capacity: int,
    sequences: int,
    most_parameters: float,
) -> int:
    """The most layers with which `sequences` fit into `capacity` and the model stays within
    `most_parameters`; 0 where one is too many."""
    layers = 0
    while layers < 1000:
        more = dataclasses.replace(config, layers=layers + 1)
        if parameters(more, vocab_size).total > most_parameters:
            break
        if peak(more, layout, vocab_size, sequences)["peak"] > capacity:
            break
        layers += 1
    return layers


def capacity_of(device_type: str) -> int:
    """Bytes that torch can hold: of the current GPU all but what others and the context take, of
    the host its physical memory, or what this process may have of it."""
    if device_type == "cpu":
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
        limits += [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit > 0]
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
        return min(limits)
    import torch

    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved()


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is torch's own, or says so: an operator of sonicmoe_cpp in a compiled graph, torch
    or the C++ library on the CPU."""
    import torch

    told = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in told for words in ("out of memory", "can't allocate memory", "bad_alloc")
    )


def out_of_memory_report(
    config: TrainConfig,
    layout: Layout,
    vocab_size: int,
    sequences: int,
    capacity: int,
    whole_model: bool = True,
) -> str:
    """Says what was too large and what fits: tensors of one layer, the whole, the advice. `sonicmoe
    memory` counts whole models alone."""
    tokens = sequences * config.seq_len
    p, m = rows(config, tokens), layout.element
    whole = peak(config, layout, vocab_size, sequences)
    tensors = {
        f"X [{tokens}, {config.hidden_size}]": m * tokens * config.hidden_size,
        f"H [{p}, {2 * config.intermediate_size}]": m * p * 2 * config.intermediate_size,
        f"logits [{tokens}, {vocab_size}] float32": 4 * tokens * vocab_size,
    }
    if config.experts != "sonicmoe_cpp":
        tensors[f"rows and Y, each [{p}, {config.hidden_size}]"] = m * p * config.hidden_size
    listed = ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in tensors.items())
    fits = largest_microbatch(config, layout, vocab_size, capacity)
    advice = f"the largest microbatch by formula is {fits} sequences"
    if config.experts == "sonicmoe_cpp" and whole_model:
        command = memory_command(config, layout, vocab_size, max(1, fits), capacity)
        advice += f" ({' '.join(command)})"
    return (
        f"out of memory with {sequences} sequences of {config.seq_len} tokens: a step needs about "
        f"{whole['peak'] / GIB:.1f} GiB of {capacity / GIB:.1f} GiB (weights and optimizer "
        f"{whole['states'] / GIB:.1f}, kept by {config.layers} layers: experts "
        f"{whole['moe_kept'] / GIB:.1f}, the rest {whole['other_kept'] / GIB:.1f}); in one layer: "
        f"{listed}; {advice}"
    )
