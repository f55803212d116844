"""What other MoE packages compute, in plain PyTorch: stand-ins with their names, arguments and
layouts, written from their documentation and sources, for the migration pages. They need no GPU.

    with_stand_ins("scattermoe")     `import scattermoe.mlp` finds the stand-in
    restore()                        and no more

sonic-moe 0.1.2.post1, ScatterMoE 0.3.0, MegaBlocks 0.11 (dMoE with mlp_impl="grouped").
"""

import dataclasses
import enum
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def experts_of(x: Tensor, ids: Tensor, weights: Tensor, expert: Callable[[int, Tensor], Tensor]):
    """y[t] = sum over k of weights[t, k] * expert(ids[t, k], x[t]), slot by slot."""
    rows = []
    for t in range(x.shape[0]):
        slots = [weights[t, k] * expert(int(ids[t, k]), x[t]) for k in range(ids.shape[1])]
        rows.append(torch.stack(slots).sum(0))
    return torch.stack(rows)


def balancing_loss(scores: Tensor, ids: Tensor) -> Tensor:
    """E * sum_e f_e p_e with f_e = share of the T*K rows, p_e = mean score."""
    num_experts = scores.shape[1]
    share = torch.bincount(ids.flatten(), minlength=num_experts) / ids.numel()
    return num_experts * (share * scores.mean(0)).sum()


# --------------------------------------------------------------------------------------- sonic-moe


class ActivationType(enum.Enum):
    SWIGLU, GEGLU, REGLU = "swiglu", "geglu", "reglu"
    RELU_SQ, RELU, GELU, SILU = "relu_sq", "relu", "gelu", "silu"


class KernelBackendMoE(enum.Enum):
    scattermoe, torch, sonicmoe = "scattermoe", "torch", "sonicmoe"


def interleaved_swiglu(h: Tensor) -> Tensor:
    return F.silu(h[..., 0::2]) * h[..., 1::2]


class StackedWeights(nn.Module):
    """weight [E, out, in], bias [E, out]."""

    def __init__(self, num_experts: int, inputs: int, outputs: int, bias: bool, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, outputs, inputs) * std)
        self.bias = nn.Parameter(torch.randn(num_experts, outputs) * std) if bias else None

    def of(self, e: int, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[e], None if self.bias is None else self.bias[e])


class SonicMoE(nn.Module):
    """Top-K of the logits, then a softmax over the K; gate and up rows alternate."""

    def __init__(
        self, num_experts: int, num_experts_per_tok: int, hidden_size: int, intermediate_size: int,
        activation_function: ActivationType, add_bias: bool, std: float,
    ):  # fmt: skip
        super().__init__()
        assert activation_function is ActivationType.SWIGLU
        self.top_k = num_experts_per_tok
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        sizes = (num_experts, hidden_size, 2 * intermediate_size)
        self.c_fc = StackedWeights(*sizes, add_bias, std)
        self.c_proj = StackedWeights(num_experts, intermediate_size, hidden_size, add_bias, std)

    def forward(
        self,
        hidden_states: Tensor,
        kernel_backend_moe: KernelBackendMoE = KernelBackendMoE.sonicmoe,
    ) -> tuple[Tensor, Tensor]:
        x = hidden_states.flatten(0, -2)
        logits = self.router(x)
        best, ids = logits.topk(self.top_k, dim=-1)

        def expert(e: int, row: Tensor) -> Tensor:
            return self.c_proj.of(e, interleaved_swiglu(self.c_fc.of(e, row)))

        y = experts_of(x, ids, best.softmax(-1), expert)
        return y.view_as(hidden_states), balancing_loss(logits.softmax(-1), ids)


def moe_general_routing_inputs(
    x: Tensor, router_scores: Tensor, token_indices: Tensor, expert_indices: Tensor,
    w1: Tensor, b1: None, w2: Tensor, b2: None, E: int, stream_id: int | None,
    activation_type: ActivationType, is_inference_mode_enabled: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A list of pairs, sorted by token; w1 [2n, d, E], w2 [d, n, E]."""
    assert bool((token_indices[1:] >= token_indices[:-1]).all())
    y = torch.zeros_like(x)
    for score, t, e in zip(router_scores, token_indices, expert_indices, strict=True):
        row = w2[..., e] @ interleaved_swiglu(w1[..., e] @ x[t])
        y = y.index_add(0, t[None].long(), (score * row)[None])
    return y, torch.bincount(expert_indices, minlength=E).int()


# -------------------------------------------------------------------------------------- ScatterMoE


class ScatterGLUMLP(nn.Module):
    """Routing comes from outside; the first half of h is up, the second is the gate."""

    def __init__(
        self, input_size: int, hidden_size: int, num_experts: int, top_k: int, bias: bool = False,
        activation: Callable = F.silu,
    ):  # fmt: skip
        super().__init__()
        self.experts = StackedWeights(num_experts, input_size, 2 * hidden_size, bias, 0.3)
        self.output_experts = StackedWeights(num_experts, hidden_size, input_size, bias, 0.3)
        self.activation = activation

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        def expert(e: int, row: Tensor) -> Tensor:
            up, gate = self.experts.of(e, row).chunk(2, dim=-1)
            return self.output_experts.of(e, self.activation(gate) * up)

        return experts_of(x.flatten(0, -2), expert_idxs, expert_p, expert).view_as(x)


# -------------------------------------------------------------------------------------- MegaBlocks


gelu_tanh = functools.partial(F.gelu, approximate="tanh")


@dataclasses.dataclass
class Arguments:
    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    moe_num_experts: int = 1
    moe_top_k: int = 1
    moe_normalize_expert_weights: float | None = None
    moe_loss_weight: float = 0.1
    num_layers: int = 1
    bias: bool = True
    return_bias: bool = True
    activation_fn: Callable = gelu_tanh
    mlp_type: str = "mlp"
    mlp_impl: str = "grouped"
    fp16: bool = True
    bf16: bool = False
    device: Any = "cpu"


_LOSSES: list[tuple[Tensor, Tensor]] = []


class MegaBlocksExperts(nn.Module):
    """w1, v1, w2 [E * n, d]: of every expert n rows, each with the width of x."""

    def __init__(self, args: Arguments):
        super().__init__()
        self.args = args
        rows = args.moe_num_experts * args.ffn_hidden_size
        self.mlp = nn.Module()
        for name in ("w1", "w2", "v1") if args.mlp_type == "glu" else ("w1", "w2"):
            weight = torch.randn(rows, args.hidden_size) * 0.3
            self.mlp.register_parameter(name, nn.Parameter(weight))

    def of(self, e: int, x: Tensor) -> Tensor:
        n, mlp = self.args.ffn_hidden_size, self.mlp
        mine = slice(e * n, e * n + n)
        h = self.args.activation_fn(mlp.w1[mine] @ x)
        if self.args.mlp_type == "glu":
            h = h * (mlp.v1[mine] @ x)
        return h @ mlp.w2[mine]


class MegaBlocksDMoE(nn.Module):
    def __init__(self, args: Arguments):
        super().__init__()
        assert not args.bias
        self.args = args
        self.router = nn.Module()
        self.router.layer = nn.Linear(args.hidden_size, args.moe_num_experts, bias=False)
        self.experts = MegaBlocksExperts(args)

    def forward(self, x: Tensor) -> Tensor:
        flat, args = x.flatten(0, -2), self.args
        scores = self.router.layer(flat).softmax(-1)
        weights, ids = scores.topk(args.moe_top_k, dim=-1)
        if args.moe_normalize_expert_weights:
            norm = weights.norm(p=args.moe_normalize_expert_weights, dim=-1, keepdim=True)
            weights = weights / norm
        if self.training and args.moe_loss_weight > 0:
            _LOSSES.append((ids, scores))
        return experts_of(flat, ids, weights, self.experts.of).view_as(x)


def batched_load_balancing_loss(args: Arguments) -> Tensor:
    each = [balancing_loss(scores, ids) for ids, scores in _LOSSES]
    return args.moe_loss_weight * torch.stack(each).sum() / args.num_layers


# -------------------------------------------------------------------------------------------------

PACKAGES: dict[str, dict[str, dict[str, Any]]] = {
    "sonicmoe": {
        "sonicmoe": {
            "MoE": SonicMoE,
            "KernelBackendMoE": KernelBackendMoE,
            "moe_general_routing_inputs": moe_general_routing_inputs,
        },
        "sonicmoe.enums": {"ActivationType": ActivationType},
    },
    "scattermoe": {"scattermoe": {}, "scattermoe.mlp": {"GLUMLP": ScatterGLUMLP}},
    "megablocks": {
        "megablocks": {},
        "megablocks.layers": {},
        "megablocks.layers.arguments": {"Arguments": Arguments},
        "megablocks.layers.dmoe": {"dMoE": MegaBlocksDMoE},
        "megablocks.layers.moe": {
            "batched_load_balancing_loss": batched_load_balancing_loss,
            "clear_load_balancing_loss": _LOSSES.clear,
        },
    },
}
_replaced: dict[str, types.ModuleType | None] = {}


def with_stand_ins(package: str) -> None:
    for name, members in PACKAGES[package].items():
        module = types.ModuleType(name)
        vars(module).update(members)
        _replaced[name] = sys.modules.get(name)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def restore() -> None:
    for name, module in _replaced.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module
    _replaced.clear()


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    assert theirs.abs().max() > 0 and ours.shape == theirs.shape
    error = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
    assert error < tolerance, f"relative error {error:.2e}"
