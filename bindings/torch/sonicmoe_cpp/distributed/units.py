"""The tensors of a spread model: gathered layer by layer, and put back part by part."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from .. import convert
from .._rules import refuse
from ..module import MoE
from .stock import Stock, expert_of, layer_of


class Split(NamedTuple):
    """Experts over dimension `dim` of a mesh, an equal share of them for each rank in it."""

    mesh: DeviceMesh
    dim: int

    @property
    def size(self) -> int:
        return self.mesh.size(self.dim)

    def experts(self, count: int) -> range:
        """Those of this rank, of `count`."""
        share = count // self.size
        first = self.mesh.get_local_rank(self.dim) * share
        return range(first, first + share)

    def writer(self, part: int, turn: int) -> int:
        """Of the ranks that hold an equal part of the experts, the one whose turn it is."""
        ranks = self.mesh.mesh.movedim(self.dim, 0).reshape(self.size, -1)[part]
        return int(ranks[turn % len(ranks)])


class Unit:
    """Tensors that are gathered and put back together: one of the model's, or those of the router
    or of the experts of an `MoE`, which other names and another order of rows stand for.

    tensors by own name. whole by stock name, on the meta device. numbered: files have a tensor for
    each expert."""

    def __init__(self, tensors: dict[str, Tensor], split: Split | None = None) -> None:
        self.tensors, self.split = tensors, split
        self.whole = {name: _meta(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self.numbered = False

    @property
    def count(self) -> int:
        """Experts, where they are spread."""
        return next(iter(self.whole.values())).shape[0]

    @property
    def experts(self) -> range | None:
        """Of this rank, where they are spread."""
        return self.split.experts(self.count) if self.split else None

    @property
    def parts(self) -> Split | None:
        """How ranks part the writing."""
        return self.split if self.numbered else None

    def gather(self) -> dict[str, Tensor]:
        """By stock name: whole tensors, or of numbered experts those of this rank. Collective."""
        found = {name: _gathered(tensor, self.parts) for name, tensor in self.tensors.items()}
        return self.to_stock(found)

    def put(self, values: dict[str, Tensor]) -> None:
        """By stock name: whole tensors, or of spread experts those of this rank. No collective."""
        own = self.to_own(values)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                local.copy_(_sharded(own[name].to(local.device), tensor, self.split))

    def to_stock(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def to_own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors


class UnitOfMoE(Unit):
    """kind: "router." or "experts."; own, stock: what its names begin with there."""

    def __init__(
        self, operation: str, kind: str, tensors: dict[str, Tensor], own: str, stock: str,
        split: Split | None, sizes: convert.Sizes, form: Any,
    ) -> None:  # fmt: skip
        super().__init__(tensors, split)
        self.kind, self.own, self.stock, self.sizes, self.form = kind, own, stock, sizes, form
        places = convert.places(operation, form, sizes.part(kind, sizes.num_experts))
        self.whole = {
            stock + key: _meta(place.shape, tensors[own + place.name].dtype)
            for key, place in places.items()
        }

    def to_stock(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._convert(tensors, self.own, self.stock, True)

    def to_own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._convert(tensors, self.stock, self.own, False)

    def _convert(
        self, tensors: dict[str, Tensor], source: str, target: str, to_stock: bool
    ) -> dict[str, Tensor]:
        given = {name.removeprefix(source): tensor for name, tensor in tensors.items()}
        sizes = self.sizes.part(self.kind, next(iter(tensors.values())).shape[0])
        forms = convert.own_format(sizes), self.form
        made = convert.rearranged(sizes, given, *(forms if to_stock else forms[::-1]))
        return {target + name: tensor for name, tensor in made.items()}


def _meta(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def units_of(operation: str, model: Any, stock: Stock) -> dict[str, list[Unit]]:
    """All tensors of model, by layer ("" is what belongs to none, and comes last).

    ValueError where they are not those that transformers has in this model."""
    left = {name: t for name, t in model.state_dict().items() if name not in stock.tied}
    units: list[Unit] = []
    for path, module in model.named_modules():
        if isinstance(module, MoE):
            units += _units_of_moe(operation, path, module, left, stock)
        elif getattr(module, "exchange", None) is not None and (
            tensors := _taken(left, f"{path}.")
        ):
            units.append(Unit(tensors, _split_of(tensors, module)))  # experts of transformers
    others: dict[str, dict[str, Tensor]] = {}
    for name, tensor in left.items():
        others.setdefault(layer_of(name), {})[name] = tensor
    units += [Unit(tensors) for tensors in others.values()]
    _check(operation, units, stock)
    layers: dict[str, list[Unit]] = {}
    for unit in units:
        unit.numbered = unit.split is not None and all(
            expert_of(name) is not None for name in stock.to_files(unit.whole)
        )
        layers.setdefault(layer_of(next(iter(unit.whole))), []).append(unit)
    return layers | {"": layers.pop("", [])}


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, taken out of tensors."""
    return {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def _check(operation: str, units: list[Unit], stock: Stock) -> None:
    shapes = {name: whole.shape for unit in units for name, whole in unit.whole.items()}
    for name in (*stock.tensors, *shapes):
        got, right = shapes.get(name), getattr(stock.tensors.get(name), "shape", None)
        if got != right:
            expected = f"{name} of shape {_list(right)}, as {stock.cls.__name__} has it"
            refuse(operation, "model", expected, _list(got))
    if any(tensor.is_meta for unit in units for tensor in unit.tensors.values()):
        refuse(operation, "model", "memory for all parameters (to_empty)", "meta tensors")


def _list(shape: Any) -> Any:
    return None if shape is None else list(shape)


def _units_of_moe(
    operation: str, path: str, module: MoE, left: dict[str, Tensor], stock: Stock
) -> Iterable[Unit]:
    """Takes its tensors out of `left`. It stands in the place of a sparse block, or in one that has
    shared experts beside it."""
    for block in (path, path.rpartition(".")[0]):
        for form in (convert.FORMATS["transformers"], convert.FORMATS["gpt-oss"]):
            if f"{block}.{form.router_weight}" not in stock.tensors:
                continue
            sizes = convert.Sizes.of(module)
            for kind in ("router", "experts"):
                tensors = _taken(left, f"{path}.{kind}.")
                split = _split_of(tensors, module.experts) if kind == "experts" else None
                yield UnitOfMoE(
                    operation, f"{kind}.", tensors, f"{path}.", f"{block}.", split, sizes, form
                )
            return
    refuse(operation, "model", "an MoE in the place of a sparse block of transformers", path)


def _split_of(tensors: dict[str, Tensor], experts: Any) -> Split | None:
    """Over the ranks of the exchange of experts, where these have one."""
    if experts.exchange is None:
        return None
    ranks = dist.get_process_group_ranks(experts.exchange.context.group)
    tensor: Any = next(iter(tensors.values()))
    mesh = tensor.device_mesh
    for dim in reversed(range(mesh.ndim)):
        if dist.get_process_group_ranks(mesh.get_group(dim)) == ranks:
            return Split(mesh, dim)
    return None


def _others(tensor: DTensor, split: Split) -> tuple[DeviceMesh, list[Any]] | None:
    """The mesh without the dimension over which experts are spread, and how the share of a rank
    lies on it; nothing where there is no other dimension."""
    mesh = tensor.device_mesh
    if mesh.ndim == 1:
        return None
    names = tuple(name for dim, name in enumerate(mesh.mesh_dim_names or ()) if dim != split.dim)
    placements = [
        Shard(placement.dim) if isinstance(placement, (Shard, _StridedShard)) else placement
        for dim, placement in enumerate(tensor.placements)
        if dim != split.dim
    ]
    return mesh[names], placements


def _gathered(tensor: Tensor, split: Split | None) -> Tensor:
    """Whole, or the share that a rank has of what is spread."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    sharded: Any = tensor.detach()
    if split is None:
        return sharded.full_tensor()
    others = _others(tensor, split)
    if others is None:
        return sharded.to_local()
    share = torch.empty((tensor.shape[0] // split.size, *tensor.shape[1:]), device="meta")
    part: Any = DTensor.from_local(
        sharded.to_local(), *others, run_check=False, shape=share.shape, stride=share.stride()
    )
    return part.full_tensor()


def _sharded(value: Tensor, tensor: Tensor, split: Split | None) -> Tensor:
    """What this rank keeps of `value`, which is what _gathered gives."""
    if not isinstance(tensor, DTensor):
        return value
    others: Any = tensor.device_mesh, tensor.placements
    if split is not None:
        others = _others(tensor, split)
    if others is None:
        return value
    return distribute_tensor(value, *others, src_data_rank=None).to_local()
