"""What the routers of a model did, over all processes."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.distributed as dist
from torch import nn
from transformers import Qwen3MoeForCausalLM

from .config import TrainConfig
from .group import Group
from .layout import Layout
from .parallel import SpreadBlock


@dataclasses.dataclass
class LayerRouting:
    """What the router of one layer did in the last forward pass."""

    logits: torch.Tensor  # [T, E], part of the autograd graph
    rows: torch.Tensor  # [E], rows each expert computed
    rows_before: torch.Tensor  # [E], rows of token choice, before any rounding


class RoutingTap:
    """Makes the experts of a model run as --experts and --ep say, and reads what its routers did.
    Counts are those of this process until the step ends, then of all."""

    def __init__(
        self,
        model: Qwen3MoeForCausalLM,
        config: TrainConfig,
        layout: Layout | None = None,
        group: Group | None = None,
    ) -> None:
        self._num_experts = config.num_experts
        self._ep = layout.ep if layout else 1
        self._group = group or Group(torch.device("cpu"))
        everyone = dist.group.WORLD if self._group.size > 1 else None
        if config.experts == "sonicmoe_cpp":
            import sonicmoe_cpp

            self._balancing_loss = functools.partial(
                sonicmoe_cpp.load_balancing_loss, top_k=config.top_k, group=everyone
            )
        else:
            self._balancing_loss = functools.partial(load_balancing_loss, group=everyone)
        self._blocks = self._replaced(model, config)
        self._rows: list[torch.Tensor] = []  # [3, layers, E] of every batch of this step
        self._dropped_before: torch.Tensor | None = None

    def _replaced(self, model: Qwen3MoeForCausalLM, config: TrainConfig) -> list[nn.Module]:
        """The blocks that compute what is asked for."""
        layers = model.model.layers
        if self._ep > 1:
            for layer in layers:
                layer.mlp = SpreadBlock(layer.mlp, config)
            return [layer.mlp for layer in layers]
        if config.experts == "sonicmoe_cpp":
            from sonicmoe_cpp.integrations.transformers import observer, replace_moe_blocks

            router = config.router.replace("-", "_")
            replace_moe_blocks(
                model, router=router, tile=config.tile, policy=config.policy, seed=config.seed
            )
            observer(_keep_output)  # it changes nothing: the blocks stay one fused layer
        else:
            model.set_experts_implementation(config.experts)
        blocks = [layer.mlp for layer in layers]
        for block in blocks:
            block.gate.register_forward_hook(_keep_output)
        return blocks

    def layers(self) -> list[LayerRouting]:
        """What each layer's router did in the last forward pass of this process."""
        return [self._routing(block) for block in self._blocks]

    def _routing(self, block: nn.Module) -> LayerRouting:
        if isinstance(block, SpreadBlock):
            logits, ids, counted = block.logits, None, block.moe
        else:
            (logits, _, ids), counted = block.gate.last_output, block
        if ids is not None:
            rows = rows_per_expert(ids, self._num_experts)
            return LayerRouting(logits, rows, rows)
        # A block of this library counts its own rows.
        return LayerRouting(
            logits, counted.last_rows_per_expert, counted.last_rows_per_expert_before
        )

    def balancing_loss(self) -> torch.Tensor:
        """Mean over the layers of each layer's load balancing loss. Rows count on all processes, so
        the mean of the processes' losses is that of one with all tokens."""
        losses = [self._balancing_loss(layer.logits, layer.rows_before) for layer in self.layers()]
        return torch.stack(losses).mean()

    def begin_step(self) -> None:
        self._rows.clear()
        self._dropped_before = self._dropped() if self._ep > 1 else None

    def count(self) -> None:
        """Adds the last forward pass to the counts of this step: rows computed, dropped by rounding
        and added by it. In one batch an expert only drops or only adds, so two counts tell both."""
        layers = self.layers()
        rows = torch.stack([layer.rows for layer in layers]).long()
        change = rows - torch.stack([layer.rows_before for layer in layers])
        self._rows.append(torch.stack([rows, (-change).clamp(min=0), change.clamp(min=0)]))

    def end_step(self) -> tuple[dict, list[list[float]]]:
        """Of all processes: counts for the metrics; per layer, the share of its rows that each
        expert computed."""
        counts = self._group.gather(sum(self._rows))  # [processes, 3, layers, E]
        rows, dropped, added = counts.sum(0)
        line = {
            "rows": int(rows.sum()),
            "rows_dropped": int(dropped.sum()),
            "rows_added": int(added.sum()),
        }
        if self._group.size > 1:
            each = rows_per_process(counts[:, 0], self._ep)
            line["rows_per_process"] = [int(each.min()), float(each.mean()), int(each.max())]
        if self._ep > 1:
            dropped = self._group.gather(self._dropped() - self._dropped_before)
            line["rows_over_capacity"] = int(dropped.sum())
        shares = rows / rows.sum(-1, keepdim=True).clamp(min=1)  # rounding may leave none
        return line, shares.tolist()

    def _dropped(self) -> torch.Tensor:
        """Rows that --row-capacity has left no room for in this process so far."""
        contexts = [block.moe.experts.exchange.context for block in self._blocks]
        counts = [context.count_on(self._group.device) for context in contexts]
        return torch.stack(counts).sum(0)


def rows_per_process(rows: torch.Tensor, ep: int) -> torch.Tensor:
    """Rows that each process computes, from those [processes, layers, E] that the tokens of each
    ask for: consecutive `ep` processes share out the experts."""
    processes, layers, experts = rows.shape
    of_groups = rows.reshape(processes // ep, ep, layers, ep, experts // ep).sum(1)
    return of_groups.sum((1, 3)).flatten().double()


def _keep_output(module, inputs, output) -> None:
    """One function for all layers: torch.compile then compiles one layer, not each."""
    module.last_output = output


def rows_per_expert(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Rows [E] int64 of each expert. Unlike bincount, histc never waits for the GPU; on the CPU it
    takes floats only."""
    values = ids.float() if ids.device.type == "cpu" else ids.int()
    return torch.histc(values, num_experts, 0, num_experts - 1).long()


def load_balancing_loss(
    logits: torch.Tensor, rows: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Switch's E * sum_e f_e p_e: f = share of rows, over a group, p = mean of
    softmax(logits [T, E])."""
    if group is not None:
        rows = rows.clone()
        dist.all_reduce(rows, group=group)
    share = rows / rows.sum()
    return logits.shape[1] * (share * logits.float().softmax(-1).mean(0)).sum()
