"""The blocks that `replace_moe_blocks` knows, and what it asks of one before any change."""

from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from ...options import RouterKeywords
from .activations import expert_options
from .plain import what_may_change_result

ADVICE = (
    "leave the block as it is and call model.set_experts_implementation('sonicmoe_cpp') "
    "after register()"
)


def _stock_forward(cls: type[nn.Module], decorators: int = 0) -> Callable | None:
    """cls.forward as transformers wrote it; None where it was patched before this import."""
    inner: Any = cls.forward
    for _ in range(decorators):
        inner = getattr(inner, "__wrapped__", None)
    stock = (
        getattr(inner, "__qualname__", None) == f"{cls.__qualname__}.forward"
        and inner.__module__ == cls.__module__
        and not hasattr(inner, "__wrapped__")
    )
    return cls.forward if stock else None


class Family:
    """One block class of transformers, with its router and its experts.

    Their forwards are kept by identity: what a subclass, a patch or a wrapper runs is another.
    """

    def __init__(
        self,
        block: type[nn.Module],
        router: type[nn.Module],
        experts: type[nn.Module],
        router_name: str,
        scoring: str,
        renormalize: bool | None = None,
        returns_scores: bool = False,
        flat_router_input: bool = True,
    ) -> None:
        self.block, self.router, self.experts = block, router, experts
        self.router_name = router_name  # of the submodule
        self.scoring = scoring
        self.renormalize = renormalize  # None: the router says (norm_topk_prob)
        self.returns_scores = returns_scores  # the block returns (hidden_states, router scores)
        self.flat_router_input = flat_router_input  # the router gets [T, d], else [B, S, d]
        self.block_forward = _stock_forward(block)
        self.router_forward = _stock_forward(router)
        self.experts_forward = _stock_forward(experts, decorators=1)

    @staticmethod
    def own(forward: Callable | None) -> Callable:
        """One of the three forwards, of a family that check_block took."""
        assert forward is not None
        return forward

    def router_options(self, router: Any) -> RouterKeywords:
        """The router's settings as options of `route`."""
        renormalize = self.renormalize
        if renormalize is None:
            renormalize = bool(router.norm_topk_prob)
        return {
            "scoring": self.scoring,
            "renormalize": renormalize,
            "num_groups": getattr(router, "num_group", 1),
            "top_groups": getattr(router, "topk_group", 1),
            "scale": float(getattr(router, "routed_scaling_factor", 1.0)),
        }


def selection_bias(router: Any) -> Tensor | None:
    # model.bfloat16() casts this buffer too. The stock router then adds what is left of it to
    # float32 scores, and so does this.
    bias = getattr(router, "e_score_correction_bias", None)
    return None if bias is None else bias.float()


FAMILIES = (
    Family(
        qwen3_moe.Qwen3MoeSparseMoeBlock,
        qwen3_moe.Qwen3MoeTopKRouter,
        qwen3_moe.Qwen3MoeExperts,
        "gate",
        "softmax_topk",
    ),
    Family(
        olmoe.OlmoeSparseMoeBlock, olmoe.OlmoeTopKRouter, olmoe.OlmoeExperts, "gate", "softmax_topk"
    ),
    Family(
        mixtral.MixtralSparseMoeBlock,
        mixtral.MixtralTopKRouter,
        mixtral.MixtralExperts,
        "gate",
        "softmax_topk",
        renormalize=True,
    ),
    Family(
        gpt_oss.GptOssMLP,
        gpt_oss.GptOssTopKRouter,
        gpt_oss.GptOssExperts,
        "router",
        "topk_softmax",
        renormalize=True,
        returns_scores=True,
    ),
    Family(
        deepseek_v3.DeepseekV3MoE,
        deepseek_v3.DeepseekV3TopkRouter,
        # Named NaiveMoe by the versions whose router does not route, which check_block refuses.
        getattr(deepseek_v3, "DeepseekV3Experts", None)
        or getattr(deepseek_v3, "DeepseekV3NaiveMoe"),  # noqa: B009
        "gate",
        "sigmoid_topk",
        flat_router_input=False,
    ),
)


def family_of(module: nn.Module) -> Family | None:
    return next((family for family in FAMILIES if isinstance(module, family.block)), None)


def innermost(module: nn.Module, cls: type[nn.Module]) -> Any:
    """module itself or what wrappers (checkpointing, FSDP, adapters) put around it."""
    return next((each for each in module.modules() if isinstance(each, cls)), None)


def check_block(
    block: nn.Module, cls: type[nn.Module], family: Family, path: str, rounds: bool
) -> None:
    """ValueError, naming path, unless a block of class cls can be replaced; changes nothing."""
    for stock, forward in (
        (family.block, family.block_forward),
        (family.router, family.router_forward),
        (family.experts, family.experts_forward),
    ):
        if forward is None:
            raise ValueError(
                f"{path}: {stock.__name__}.forward: expected transformers' own, got "
                f"{stock.forward.__module__}.{stock.forward.__qualname__}: {ADVICE}"
            )
    if cls.forward is not family.block_forward:
        raise ValueError(
            f"{path}: {cls.__name__}.forward: expected the forward of {family.block.__name__}, got "
            f"{cls.forward.__module__}.{cls.forward.__qualname__}: {ADVICE}"
        )
    children: dict[str, Any] = {}
    for name, wanted in ((family.router_name, family.router), ("experts", family.experts)):
        child = getattr(block, name, None)
        children[name] = innermost(child, wanted) if isinstance(child, nn.Module) else None
        if children[name] is None:
            raise ValueError(
                f"{path}.{name}: expected {wanted.__name__} or a wrapper of one, got "
                f"{type(child).__name__}: leave the block as it is"
            )
    router = children[family.router_name]
    if not hasattr(router, "top_k"):
        raise ValueError(
            f"{path}.{family.router_name}: expected a router that returns weights and ids, got the "
            f"one of transformers {transformers.__version__}: update transformers, or {ADVICE}"
        )
    expert_options(children["experts"], f"{path}.experts")
    if rounds:
        check_rounding(getattr(block, family.router_name), family, f"{path}.{family.router_name}")


def check_rounding(router: nn.Module, family: Family, path: str) -> None:
    """ValueError unless a call of router returns what its class computes: rounding goes by the
    logits, so weights and ids that something else chose would be lost."""
    got = what_may_change_result(router, family.router, family.own(family.router_forward))
    if got is not None:
        raise ValueError(
            f"{path}: token_rounding: expected the result of {family.router.__name__}.forward, "
            f"got {got}: use router='topk'"
        )
