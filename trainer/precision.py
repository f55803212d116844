"""How a trainer keeps its numbers: float32 weights under autocast, or bfloat16 weights with
masters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers import Qwen3MoeForCausalLM

from .config import TrainConfig
from .model import autocast

BUCKET = 1 << 26  # parameters that MasterAdamW converts to float32 at a time


def adamw(parameters: Iterable[torch.Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def by_name(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters in the order of their names."""
    return [p for _, p in sorted(model.named_parameters())]


class Autocast:
    """Float32 weights, gradients and moments; products in --dtype."""

    logit_rows = 0  # tokens whose logits exist at a time; 0: all

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device

    def prepare(self, model: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
        return model.to(self.device)

    def autocast(self):
        return autocast(self.config, self.device)

    def optimizer(self, model: Qwen3MoeForCausalLM) -> torch.optim.Optimizer:
        return adamw(by_name(model), self.config)

    def clip(self, model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """The gradients' norm, brought down to --grad-clip."""
        return torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.grad_clip)


class Masters(Autocast):
    """bfloat16 weights and gradients, float32 masters and moments. Nothing is cast: with --dtype
    float32 every product runs in the weights' own type."""

    logit_rows = 4096

    def prepare(self, model: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
        for parameter in model.to(self.device).parameters():  # the rotary frequencies stay float32
            parameter.data = parameter.data.bfloat16()
        return model

    def optimizer(self, model: Qwen3MoeForCausalLM) -> MasterAdamW:
        return MasterAdamW(by_name(model), self.config)

    def clip(self, model: Qwen3MoeForCausalLM, optimizer: MasterAdamW) -> torch.Tensor:
        return optimizer.clip(self.config.grad_clip)


class MasterAdamW:
    """AdamW on float32 masters of bfloat16 parameters, bucket by bucket: float32 gradients exist
    for one bucket at a time."""

    def __init__(self, parameters: list[torch.nn.Parameter], config: TrainConfig) -> None:
        self.parameters, self.scale = parameters, 1.0
        self.buckets = []
        for bucket in buckets(parameters, BUCKET):
            masters = [p.detach().float() for p in bucket]
            self.buckets.append((bucket, masters, adamw(masters, config)))

    @property
    def param_groups(self) -> list[dict]:
        return [group for *_, optimizer in self.buckets for group in optimizer.param_groups]

    def clip(self, largest: float) -> torch.Tensor:
        """The gradients' norm; the next step scales them to at most `largest`, in float32."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters]).float()
        self.scale = (largest / norm).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self) -> None:
        for bucket, masters, optimizer in self.buckets:
            for parameter, master in zip(bucket, masters, strict=True):
                master.grad = parameter.grad.float().mul_(self.scale)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_copy_(bucket, masters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def buckets(parameters: list, size: int) -> Iterator[list]:
    """Consecutive parameters, as few as hold `size` elements together."""
    bucket, count = [], 0
    for parameter in parameters:
        bucket.append(parameter)
        count += parameter.numel()
        if count >= size:
            yield bucket
            bucket, count = [], 0
    if bucket:
        yield bucket
