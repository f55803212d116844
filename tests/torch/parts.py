"""The layer put together from the package's own functions."""

import sonicmoe_cpp as sm
import torch


def layer_in_parts(module, x, logits):
    """What `module` in training computes from x [T, d] and its router's logits [T, E], by sm.route
    and sm.moe, or sm.round_tokens and sm.moe_pairs: y [T, d] and rows per expert [E] int32."""
    experts, options = module.experts, module.options
    weights = {name: getattr(experts, name) for name in ("w1", "w2", "b1", "b2")}
    scoring = options.router.scoring
    if options.rounding is None:
        ids, scores = sm.route(logits, module.top_k, scoring=scoring)
        y = sm.moe(x, topk_ids=ids, topk_weights=scores, **weights)
    else:
        tile, policy = options.rounding.tile, options.rounding.policy
        tokens, ids, scores = sm.round_tokens(
            logits, module.top_k, tile=tile, policy=policy, scoring=scoring
        )
        y = sm.moe_pairs(x, token_ids=tokens, expert_ids=ids, pair_weights=scores, **weights)
    chosen = ids[ids >= 0].long()
    return y, torch.bincount(chosen, minlength=module.num_experts).int()
