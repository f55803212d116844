"""Parameters [e, rows, columns] under the names of Megatron's SequentialMLP, expert by expert."""

from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor, nn

from ..._checks import refuse

LINEAR = {"w1": "linear_fc1.weight", "w2": "linear_fc2.weight"}


def _name(prefix: str, expert: int, parameter: str) -> str:
    return f"{prefix}local_experts.{expert}.{LINEAR[parameter]}"


def split_experts(module: Any, state: dict, prefix: str, metadata: Any) -> None:
    """A hook of state_dict()."""
    for parameter in LINEAR:
        for expert, weight in enumerate(state.pop(prefix + parameter)):
            state[_name(prefix, expert, parameter)] = weight


def merge_experts(module: nn.Module, state: dict, prefix: str, *unused: Any) -> None:
    """A hook of load_state_dict(), which takes w1 and w2 too."""
    experts = range(module.num_local_experts)  # type: ignore[arg-type]
    for parameter in LINEAR:
        names = [_name(prefix, expert, parameter) for expert in experts]
        if all(name in state for name in names):
            state[prefix + parameter] = torch.stack([state.pop(name) for name in names])
    for name in [n for n in state if n.startswith(prefix) and n.endswith("._extra_state")]:
        del state[name]  # of TransformerEngine's linear layers


class Place(NamedTuple):
    """Of the experts of a rank: where they stand among all, and among their replicas."""

    rank: int
    size: int
    replica: int
    local: int  # experts of a rank
    offsets: tuple  # of what is around the experts, the layers for one
    single: bool  # experts have keys of their own, else a dimension in front

    def key(self, prefix: str, expert: int, name: str) -> str:
        index = f".{self.rank * self.local + expert}" if self.single else ""
        return f"{prefix}experts{index}.{name}"

    def of_expert(self, expert: int) -> tuple:
        if self.single:
            return self.offsets
        index, total = self.rank * self.local + expert, self.size * self.local
        return (*self.offsets, (len(self.offsets), index, total))


def factory(
    prefix: str, parameter: str, weight: Tensor, place: Place, halves: bool
) -> ShardedTensorFactory:
    """Of one parameter. halves: gate and up are shards of their own."""

    def shard(key: str, tensor: Tensor, replica_id: Any, expert: int) -> Any:
        offsets = place.of_expert(expert)
        sharded = ShardedTensor.from_rank_offsets(
            place.key(key, expert, LINEAR[parameter]), tensor, *offsets, replica_id=replica_id,
            prepend_axis_num=len(offsets),
        )  # fmt: skip
        if not halves:
            return sharded
        return apply_swiglu_sharded_factory(sharded, offsets, place.single).build()

    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: Any) -> list:
        if flattened_range is not None:
            expected = "whole optimizer states (fully_reshardable)"
            refuse("SonicExperts", "flattened_range", expected, flattened_range)
        return [shard(key, each, replica_id, expert) for expert, each in enumerate(tensor)]

    def merge(parts: list) -> Tensor:
        return torch.stack([torch.cat(part) if halves else part for part in parts])

    return ShardedTensorFactory(prefix, weight, build, merge, (0, 0, place.replica))


def extra_states(prefix: str, place: Place) -> dict[str, Any]:
    """The empty states of precision that SequentialMLP looks for."""
    states = {}
    for expert in range(place.local):
        for linear in ("linear_fc1", "linear_fc2"):
            name = f"{linear}._extra_state"
            states[f"{prefix}local_experts.{expert}.{name}"] = make_sharded_object_for_checkpoint(
                None, place.key(prefix, expert, name), place.of_expert(expert),
                (0, 0, place.replica),
            )  # fmt: skip
    return states
