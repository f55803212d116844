"""The layer put together from the package's own functions."""

import sonicmoe_cpp as sm
import torch


def layer_in_parts(module, x, logits):
    """What `module` in training computes from x [T, d] and its router's logits [T, E], by sm.route
    and sm.moe, or sm.round_tokens and sm.moe_pairs: y [T, d] and rows per expert [E] int32."""
    biases = {"b1": module.b1, "b2": module.b2}
    scoring = module.options["scoring"]
    if module.router == "topk":
        experts, weights = sm.route(logits, module.top_k, scoring=scoring)
        y = sm.moe(x, module.w1, module.w2, experts, weights, **biases)
    else:
        tokens, experts, weights = sm.round_tokens(
            logits, module.top_k, tile=module.tile, policy=module.policy, scoring=scoring
        )
        y = sm.moe_pairs(x, module.w1, module.w2, tokens, experts, weights, **biases)
    chosen = experts[experts >= 0].long()
    return y, torch.bincount(chosen, minlength=module.num_experts).int()
