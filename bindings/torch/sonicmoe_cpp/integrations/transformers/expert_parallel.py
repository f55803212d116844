"""The expert parallelism of transformers, with a token's row sent to each rank once.

`DistributedConfig(ep_size=..., ep_implementation="sonicmoe_cpp")`: transformers shards the experts
and says which ranks share a batch; the exchange is that of `sonicmoe_cpp.distributed`.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..._checks import refuse
from ...distributed import Context
from ...distributed.parallel import Exchange
from .activations import expert_options
from .experts import BACKEND, expert_weights, experts_forward


def is_registered(name: str) -> bool:
    return name in EPImplementationInterface()


class GatherEP(EPImplementation):
    """Ranks with batches of their own gather tokens, as `sonicmoe_cpp.distributed.moe` does, any
    number of them on each. Ranks that share one batch have the tokens already; where only some
    share, these take equal parts of it and gather the results."""

    options: dict[str, Any]  # of the exchange

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts: Any = experts
        self._check_backend()
        expert_options(experts, f"sonicmoe_cpp: {type(experts).__name__}")
        w1 = expert_weights(experts)["w1"]  # a DTensor, of all experts
        context = Context(ep_mesh, w1.shape[2], w1.shape[0], None, dtype=w1.dtype)
        self.exchange = Exchange(
            context, **self.options, equal_tokens=False, shared_tokens=self.shares_batch
        )

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self._check_backend()
        inputs = (hidden_states, top_k_index, top_k_weights)
        if self.shares_batch or self.tp_mesh.size() == 1:
            return self.experts_forward(*inputs, exchange=self.exchange)
        parts = (_part(tensor, self.tp_mesh) for tensor in inputs)
        y = self.experts_forward(*parts, exchange=self.exchange).contiguous()
        placed = DTensor.from_local(
            y, self.tp_mesh, [Shard(0)], shape=hidden_states.shape, stride=(y.shape[1], 1)
        )
        return placed.full_tensor()

    def _check_backend(self) -> None:
        name = self.experts.config._experts_implementation
        if name not in ALL_EXPERTS_FUNCTIONS or ALL_EXPERTS_FUNCTIONS[name] is not experts_forward:
            operation, expected = "sonicmoe_cpp: ep_implementation", f"{BACKEND!r} with this one"
            refuse(operation, "experts_implementation", expected, repr(name))


def _part(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows of this rank, of a tensor that all ranks have; they gather its gradient."""
    whole = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return whole.redistribute(mesh, [Shard(0)]).to_local()


def register(name: str, **options: Any) -> None:
    EPImplementationInterface.register(name, type("GatherEP", (GatherEP,), {"options": options}))
