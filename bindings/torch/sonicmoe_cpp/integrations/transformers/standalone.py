"""A block's router and experts as a layer of this library, without transformers."""

from typing import Any

import torch
from torch import nn

from ...module import MoE
from .activations import expert_options
from .blocks import stock_class
from .experts import expert_weights
from .families import check_block, family_of, innermost, selection_bias
from .plain import all_plain


def to_moe(block: nn.Module) -> MoE:
    """A `sonicmoe_cpp.MoE` that computes what the router and the experts of a sparse block compute,
    with copies of their parameters: y = layer(hidden_states).

    block: of a family that `replace_moe_blocks` knows, replaced or not; it stays as it is. Its
    shared_experts are no part of the layer: add their output to y. The layer is in the block's
    training mode and on its device. ValueError, and no layer, where the library cannot compute the
    block, or a parameter is quantised, sharded or of another dtype than the experts'.
    """
    path = f"to_moe: {type(block).__name__}"
    family = family_of(block)
    if family is None:
        raise ValueError(f"{path}: expected a sparse MoE block that replace_moe_blocks knows")
    check_block(block, stock_class(block), family, path, rounds=False)
    router = innermost(block.get_submodule(family.router_name), family.router)
    experts = innermost(block.get_submodule("experts"), family.experts)
    if noise := getattr(block, "jitter_noise", 0.0):
        raise ValueError(f"{path}.jitter_noise: expected 0, got {noise}: the layer has none")
    source: dict[str, Any] = {
        "router.weight": router.weight,
        "router.bias": getattr(router, "bias", None),
        "router.selection_bias": selection_bias(router),
    }
    source |= {f"experts.{name}": tensor for name, tensor in expert_weights(experts).items()}
    source = {name: tensor for name, tensor in source.items() if tensor is not None}
    w1, w2 = source["experts.w1"], source["experts.w2"]
    dtypes = {tensor.dtype for name, tensor in source.items() if "selection" not in name}
    if not all_plain(source.values()) or dtypes != {w1.dtype}:
        kinds = {name: f"{type(t).__name__} of {t.dtype}" for name, t in source.items()}
        raise ValueError(f"{path}: expected plain tensors of one dtype, got {kinds}")
    layer = MoE(
        w1.shape[2],
        w2.shape[2],
        w1.shape[0],
        router.top_k,
        selection_bias="router.selection_bias" in source,
        router_bias="router.bias" in source,
        expert_bias="experts.b1" in source,
        device=w1.device,
        dtype=w1.dtype,
        **family.router_options(router),
        **expert_options(experts, f"{path}.experts"),
    )
    with torch.no_grad():
        layer.load_state_dict(source)
    return layer.train(block.training)
