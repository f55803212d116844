"""Folders of transformers: from a model that is spread over ranks, and into one.

Layer by layer: FSDP's shards are gathered, and each rank of an expert-parallel group writes, or
reads, its own experts. No rank has more than one layer and one file of others' weights at a time.
"""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._rules import refuse
from ..module import MoE
from .stock import Stock, expert_of, renumbered
from .units import Unit, units_of

_INDEX = "model.safetensors.index.json"
_WRITING = ".writing"  # the folder within, until all files are complete


def save_pretrained(
    model: Any, folder: str | os.PathLike, *, max_shard_size: int | str = "5GB"
) -> None:
    """Writes a folder that `from_pretrained` of transformers loads. Collective over all ranks.

    model: a PreTrainedModel as it is in training: plain or under `fully_shard`, with blocks of its
    own, replaced ones or `MoE`s (as of `to_moe`), spread by `parallelize_experts` or not. Names and
    order are those of the family: experts one by one where the hub has them so. Every rank of an
    expert-parallel group writes its experts, ranks with the same ones take turns by layer, and the
    first rank writes the rest, config.json and the index. Where files have all experts in one
    tensor (gpt-oss) the first rank gathers those of one layer.

    folder: seen by all ranks; made where it is missing. Its former weights stay until all files are
    complete, then these take their place and the index comes last: a save that fails or is killed
    leaves the former model, or none. max_shard_size: of a file, as in transformers.

    An error on one rank is one on every rank. ValueError: another model, or one with other tensors
    than transformers' class has.
    """
    operation, path, rank = "save_pretrained", Path(folder), dist.get_rank()
    with _on_every_rank(operation):
        stock = Stock(operation, model)
        layers = units_of(operation, model, stock)
    plan: list[Any] = [None]
    with _on_every_rank(operation):
        if rank == 0:
            plan = [_plan(layers, stock, max_shard_size)]
            path.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(path / _WRITING, ignore_errors=True)
            (path / _WRITING).mkdir()
    dist.broadcast_object_list(plan, src=0)
    try:
        writer = _Writer(path / _WRITING, plan[0].of_rank(rank))
        for layer, units in layers.items():
            _write_layer(units, plan[0].writers[layer], stock, writer)
        with _on_every_rank(operation):
            writer.finish()
        with _on_every_rank(operation):
            if rank == 0:
                _write_config(model, stock, path / _WRITING)
                _publish(path, plan[0])
    except BaseException:
        if rank == 0:
            shutil.rmtree(path / _WRITING, ignore_errors=True)
        raise


def load_pretrained(model: Any, folder: str | os.PathLike) -> None:
    """Loads what `save_pretrained`, transformers or the hub has in a folder of safetensors into a
    model that is spread over ranks, in place. To be called by all ranks.

    model: as in `save_pretrained`, with memory for its parameters, of whatever content
    (`to_empty`). Every rank reads its own experts, or slices of a tensor of all, and one layer of
    the rest at a time. Numbers are cast to the dtype of the parameters. Buffers that no file has,
    such as the frequencies of rotary embeddings, are computed.

    An error on one rank is one on every rank. ValueError, before anything is loaded: a tensor that
    the files lack or have in another shape, and quantised files.
    """
    operation = "load_pretrained"
    with _on_every_rank(operation):
        stock = Stock(operation, model)
        layers = units_of(operation, model, stock)
        files = _Files(operation, Path(folder))
        tensors = stock.from_files(files.names)
        for read in (files.shape, files.tensor):  # shapes first: what can be wrong is seen there
            for units in layers.values():
                for unit in units:
                    parts = {key: _read(operation, unit, key, tensors, read) for key in unit.whole}
                    if read == files.tensor:
                        unit.put(parts)
        for module in model.modules():
            computed = module._non_persistent_buffers_set and not module._parameters
            if computed and not isinstance(module, MoE):
                model._init_weights(module)


@contextlib.contextmanager
def _on_every_rank(operation: str) -> Iterator[None]:
    """An error within is one on every rank, which all come to the end of the block."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    told: list[Any] = [None] * dist.get_world_size()
    own = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(told, own)
    if error is not None:
        raise error
    for rank, what in enumerate(told):
        if what is not None:
            raise RuntimeError(f"{operation}: rank {rank} failed: {what}")


# ------------------------------------------------------------------------------------------- saving


class _Plan(NamedTuple):
    """What is written where."""

    writers: dict[str, list[list[int]]]  # by layer, of each unit: the ranks that write
    files: list[tuple[int, dict[str, int]]]  # of each file: its rank, bytes by name

    def name(self, index: int) -> str:
        return f"model-{index + 1:05}-of-{len(self.files):05}.safetensors"

    def of_rank(self, rank: int) -> dict[str, list[str]]:
        """Names of the tensors in the files of a rank."""
        return {
            self.name(index): list(tensors)
            for index, (owner, tensors) in enumerate(self.files)
            if owner == rank
        }

    def index_file(self) -> str:
        weights = {
            tensor: self.name(index)
            for index, (_, tensors) in enumerate(self.files)
            for tensor in tensors
        }
        total = sum(sum(tensors.values()) for _, tensors in self.files)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        return json.dumps(content, indent=2) + "\n"


def _plan(layers: dict[str, list[Unit]], stock: Stock, max_shard_size: int | str) -> _Plan:
    from huggingface_hub import split_state_dict_into_shards_factory

    writers: dict[str, list[list[int]]] = {}
    owned: dict[int, dict[str, int]] = {}
    for turn, (layer, units) in enumerate(layers.items()):
        writers[layer] = []
        for unit in units:
            ranks = [0]
            if unit.parts is not None:
                ranks = [unit.parts.writer(part, turn) for part in range(unit.parts.size)]
            writers[layer].append(ranks)
            for name, tensor in stock.to_files(unit.whole).items():
                part = (expert_of(name) or 0) * len(ranks) // unit.count if unit.parts else 0
                owned.setdefault(ranks[part], {})[name] = tensor.nbytes
    files = []
    for rank, sizes in sorted(owned.items()):
        shards = split_state_dict_into_shards_factory(
            sizes, get_storage_size=int, max_shard_size=max_shard_size,
            filename_pattern="{suffix}.safetensors",
        )  # fmt: skip
        for names in shards.filename_to_tensors.values():
            files.append((rank, {name: sizes[name] for name in names}))
    return _Plan(writers, files)


def _write_layer(
    units: list[Unit], writers: list[list[int]], stock: Stock, writer: "_Writer"
) -> None:
    """Collective; what a rank itself does wrong is kept for writer.finish()."""
    rank = dist.get_rank()
    for unit, ranks in zip(units, writers, strict=True):
        parts = unit.gather()
        if rank not in ranks:
            continue
        with writer.careful():
            first = unit.experts.start if unit.parts and unit.experts else 0
            for name, tensor in stock.to_files(parts).items():
                writer.add(renumbered(name, first), tensor)


class _Writer:
    """Files of one rank. A file is written when all of its tensors are there."""

    def __init__(self, folder: Path, files: dict[str, list[str]]) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.file_of = {name: file for file, names in files.items() for name in names}
        self.missing = {file: set(names) for file, names in files.items()}
        self.tensors: dict[str, dict[str, Tensor]] = {file: {} for file in files}

    @contextlib.contextmanager
    def careful(self) -> Iterator[None]:
        """The other ranks wait for this one in what it gathers next: an error comes at the end."""
        if self.error is not None:
            self.tensors.clear()
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def add(self, name: str, tensor: Tensor) -> None:
        import safetensors.torch

        if self.error is not None:
            return
        file = self.file_of[name]
        self.tensors[file][name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.missing[file].remove(name)
        if not self.missing[file]:
            path = self.folder / file
            safetensors.torch.save_file(self.tensors.pop(file), path, metadata={"format": "pt"})
            _sync(path)

    def finish(self) -> None:
        if self.error is not None:
            raise self.error
        for file, names in self.missing.items():
            if names:
                raise RuntimeError(f"{file} lacks {sorted(names)[0]}")


def _write_config(model: Any, stock: Stock, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [stock.cls.__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _publish(path: Path, plan: _Plan) -> None:
    """Complete files take the place of former ones. The index is the first to go and the last to
    come: between, there is no model."""
    writing = path / _WRITING
    names = [plan.name(index) for index in range(len(plan.files))]
    for name in names:
        if not (writing / name).is_file():
            raise FileNotFoundError(
                f"save_pretrained: folder: expected one that all ranks see, got no {name} in "
                f"{writing}, which another rank wrote"
            )
    (writing / _INDEX).write_text(plan.index_file())
    _sync(writing / _INDEX)
    (path / _INDEX).unlink(missing_ok=True)
    for pattern in ("model*.safetensors", "pytorch_model*.bin", "pytorch_model*.bin.index.json"):
        for former in path.glob(pattern):
            former.unlink()
    for file in writing.iterdir():
        if file.name != _INDEX:
            os.replace(file, path / file.name)
    os.replace(writing / _INDEX, path / _INDEX)
    writing.rmdir()
    _sync(path)


def _sync(path: Path) -> None:
    """Brings a file's bytes, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------ loading


class _Files:
    """The tensors in a folder's safetensors, each read when it is asked for."""

    def __init__(self, operation: str, folder: Path) -> None:
        from safetensors import safe_open

        config = json.loads((folder / "config.json").read_text())
        if config.get("quantization_config") is not None:
            method = config["quantization_config"].get("quant_method")
            refuse(operation, "folder", "weights that are not quantised", method)
        single = folder / "model.safetensors"
        if single.is_file():
            files = [single]
        elif (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text())
            files = [folder / file for file in sorted(set(index["weight_map"].values()))]
        else:
            expected = f"model.safetensors or {_INDEX} in it"
            refuse(operation, "folder", expected, f"neither in {folder}")
        opened = [safe_open(file, framework="pt") for file in files]
        self.places = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> list[str]:
        return list(self.places)

    def shape(self, name: str, rows: range | None) -> Tensor:
        """Of the tensor, or of some of its rows, as one without memory."""
        shape = list(self.places[name].get_slice(name).get_shape())
        if rows is not None:
            shape[0] = len(range(*slice(rows.start, rows.stop).indices(shape[0])))
        return torch.empty(shape, device="meta")

    def tensor(self, name: str, rows: range | None) -> Tensor:
        if rows is None:
            return self.places[name].get_tensor(name)
        return self.places[name].get_slice(name)[rows.start : rows.stop]


def _read(
    operation: str,
    unit: Unit,
    key: str,
    tensors: dict[str, Any],
    read: Callable[[str, range | None], Tensor],
) -> Tensor:
    """The tensor of a stock name: whole, or of the experts that are this rank's."""
    experts, shape = unit.experts, list(unit.whole[key].shape)
    if experts is not None:
        shape[0] = len(experts)
    if key not in tensors:
        refuse(operation, "folder", f"a tensor for {key}", "none")
    stacked = [name for name, _ in tensors[key].names if expert_of(name) is None]
    value = tensors[key].read(lambda n: read(n, experts if n in stacked else None), experts)
    if list(value.shape) != shape:
        refuse(operation, "folder", f"{key} of shape {shape}", list(value.shape))
    return value
