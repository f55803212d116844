"""What each Mixture-of-Experts layer keeps for its backward pass: counted, and by the formula."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen3MoeForCausalLM

from .config import TrainConfig

METADATA_BYTES_PER_ROW = 32  # the most that routing may keep, beside the router's logits


def measure_kept_bytes(model: Qwen3MoeForCausalLM, forward: Callable[[], object]) -> list[int]:
    """Bytes each layer's experts and router keep besides their input and the weights.

    Runs `forward` once and counts the distinct storages that autograd is handed inside each block.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[dict[int, int]] = [{} for _ in model.model.layers]
    keep_alive: list[torch.Tensor] = []  # a freed storage's address could come again
    open_hooks = contextlib.ExitStack()

    def before(index: int, block_input: torch.Tensor) -> None:
        excluded = weights | {block_input.untyped_storage().data_ptr()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in excluded:
                kept[index][storage.data_ptr()] = storage.nbytes()
                keep_alive.append(tensor)
            return tensor

        open_hooks.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))

    handles = []
    for index, layer in enumerate(model.model.layers):
        handles.append(
            layer.mlp.register_forward_pre_hook(
                lambda module, inputs, index=index: before(index, inputs[0])
            )
        )
        handles.append(
            layer.mlp.register_forward_hook(lambda module, inputs, output: open_hooks.close())
        )
    try:
        forward()
    finally:
        open_hooks.close()
        for handle in handles:
            handle.remove()
    return [sum(storages.values()) for storages in kept]


def memory_report(config: TrainConfig, measured: list[int], rows: list[int]) -> dict:
    """measured: bytes per layer; rows: rows per layer in the same forward pass."""
    element = 4 if config.dtype == "float32" else 2
    width = 2 * config.intermediate_size  # gate and up
    logits = 4 * config.tokens_per_batch * config.num_experts
    formula = [count * (element * width + METADATA_BYTES_PER_ROW) + logits for count in rows]
    return {
        "what": "bytes one Mixture-of-Experts layer keeps for backward, besides its input and the "
        "weights, for one batch",
        "tokens_per_batch": config.tokens_per_batch,
        "experts": config.experts,
        "router": config.router,
        "dtype": config.dtype,
        "rows_per_layer": rows,
        "measured_bytes_per_layer": measured,
        "formula_bytes_per_layer": formula,
        "formula": f"rows * ({element} * 2 * intermediate_size + at most {METADATA_BYTES_PER_ROW}) "
        "+ 4 * tokens * experts of logits",
        "peak_process_bytes": peak_process_bytes(),
    }


def peak_process_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
