"""A model as transformers has it: which tensors, and under which names files have them.

Names come in three kinds. *Own* are those of the model at hand, in which an `MoE` may stand for a
sparse block. *Stock* are those of transformers' class in memory. *File* names are what the family
has on the hub; transformers' own mapping leads from stock names to them and back.
"""

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from .._rules import refuse

_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")


class Stock:
    """The class of `model` as transformers has it, on the meta device."""

    def __init__(self, operation: str, model: Any) -> None:
        import transformers

        if not isinstance(model, transformers.PreTrainedModel):
            refuse(operation, "model", "a model of transformers", type(model).__name__)
        self.cls: Any = next(
            cls
            for cls in type(model).__mro__
            if issubclass(cls, transformers.PreTrainedModel) and not issubclass(cls, FSDPModule)
        )
        with torch.device("meta"):
            self.model = self.cls(copy.deepcopy(model.config))
        tied = getattr(self.model, "all_tied_weights_keys", {})
        self.tensors: dict[str, Tensor] = {
            name: tensor for name, tensor in self.model.state_dict().items() if name not in tied
        }
        self.tied = set(tied)

    def to_files(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by stock names, all of a layer's or some experts of one, as files have them."""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, tensors)

    def from_files(self, names: Iterable[str]) -> dict[str, "FileTensors"]:
        """How the tensors of these file names become those of stock names."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        steps = get_model_conversion_mapping(self.model)
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        renamings = [step for step in steps if not isinstance(step, WeightConverter)]
        found: dict[str, FileTensors] = {}
        for name in sorted(names, key=_natural):
            key, converter, pattern = name, None, name
            if name not in self.tensors:
                for renaming in renamings:
                    key, _ = renaming.rename_source_key(key)
                for each in converters:
                    renamed, matched = each.rename_source_key(key)
                    if matched is not None:
                        key, converter, pattern = renamed, each, matched
                        break
            if key in self.tensors:
                entry = found.setdefault(key, FileTensors(self.model, key, converter))
                entry.names.append((name, pattern))
        return found


class FileTensors:
    """The tensors in files that make up one of a stock name."""

    def __init__(self, model: Any, key: str, converter: Any) -> None:
        self.model, self.key, self.converter = model, key, converter
        self.names: list[tuple[str, str]] = []  # with the pattern that takes each

    def read(self, read: Callable[[str], Tensor], experts: range | None = None) -> Tensor:
        """The tensor of the stock name; of these experts alone, where the files number them."""
        chosen = [
            (name, pattern)
            for name, pattern in self.names
            if experts is None or expert_of(name) is None or expert_of(name) in experts
        ]
        if self.converter is None:
            return read(chosen[0][0])
        step = copy.deepcopy(self.converter)
        for name, pattern in chosen:
            step.add_tensor(self.key, name, pattern, read(name))
        return step.convert(self.key, model=self.model, config=self.model.config)[self.key]


def expert_of(name: str) -> int | None:
    """The number of the one expert whose tensor a file name names."""
    found = _EXPERT.search(name)
    return None if found is None else int(found[0])


def renumbered(name: str, first: int) -> str:
    """The file name of an expert that is `first` experts further on."""
    return _EXPERT.sub(lambda found: str(int(found[0]) + first), name)


def layer_of(name: str) -> str:
    """What a layer's names begin with; empty for all other names."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else ""


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in name.split(".")]
