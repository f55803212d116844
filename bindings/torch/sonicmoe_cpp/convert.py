"""State dicts of `MoE` from and to the formats of other layers.

    layer.load_state_dict(convert.import_state_dict(layer, theirs, "sonic-moe"))
    theirs = convert.export_state_dict(layer, "sonic-moe")

A format says where the same numbers stand: y = sum over k of weight k * expert k (x) has the same
parameters in each. What a layer makes of them (scoring, activation) is in its options, see
docs/guide/checkpoints.md.

| format | router | gate and up | down |
|---|---|---|---|
| `sonic-moe` | `router` | `c_fc` [E, 2n, d], rows of gate and up alternate | `c_proj` [E, d, n] |
| `transformers` | `gate` | `experts.gate_up_proj` [E, 2n, d], gate first | `down_proj` [E, d, n] |
| `transformers-list` | `gate` | `experts.N.gate_proj`, `up_proj`: [n, d] | `down_proj` [d, n] |
| `mixtral` | `gate` | `experts.N.w1`, `w3`: [n, d] | `w2` [d, n] |
| `gpt-oss` | `router` | `experts.gate_up_proj` [E, d, 2n], alternating | `down_proj` [E, n, d] |

`transformers` is what a model of transformers 5 holds in memory, `transformers-list` and `mixtral`
what many files on the hub hold. `router`, `gate`, `c_fc`, `c_proj` and the tensors of single
experts have `.weight` at the end of their keys.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import is_plain
from ._library import gate_factor
from ._rules import refuse
from .module import MoE

__all__ = ["FORMATS", "export_state_dict", "import_state_dict"]


class _Format(NamedTuple):
    """Keys of a state dict, None for what it has no place for; {} is the number of the expert."""

    router_weight: str  # [E, d]
    up: tuple[str, ...]  # gate and up in one tensor, or the gate's key and the up projection's
    down: str
    ungated_up: str | None = None  # of experts without a gate
    router_bias: str | None = None
    selection_bias: str | None = None
    up_bias: str | None = None
    down_bias: str | None = None
    interleaved: bool = False  # rows of gate and up alternate; else the gate's come first
    transposed: bool = False  # weights are [in, out]; else [out, in]


_BIAS = "gate.e_score_correction_bias"
FORMATS = {
    "sonic-moe": _Format(
        "router.weight", ("c_fc.weight",), "c_proj.weight", "c_fc.weight",
        up_bias="c_fc.bias", down_bias="c_proj.bias", interleaved=True,
    ),
    "transformers": _Format(
        "gate.weight", ("experts.gate_up_proj",), "experts.down_proj", "experts.up_proj",
        selection_bias=_BIAS,
    ),
    "transformers-list": _Format(
        "gate.weight", ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight"),
        "experts.{}.down_proj.weight", "experts.{}.up_proj.weight", selection_bias=_BIAS,
    ),
    "mixtral": _Format(
        "gate.weight", ("experts.{}.w1.weight", "experts.{}.w3.weight"), "experts.{}.w2.weight",
    ),
    "gpt-oss": _Format(
        "router.weight", ("experts.gate_up_proj",), "experts.down_proj",
        router_bias="router.bias", up_bias="experts.gate_up_proj_bias",
        down_bias="experts.down_proj_bias", interleaved=True, transposed=True,
    ),
}  # fmt: skip


def import_state_dict(
    layer: MoE,
    state_dict: Mapping[str, Tensor],
    format: str,
    prefix: str = "",
    ignore: Iterable[str] = (),
) -> dict[str, Tensor]:
    """The tensors of another layer as `layer.load_state_dict` takes them.

    layer: says sizes, `gate_up_layout` and which biases there are; may be on the meta device, and
    stays as it is. state_dict: keys of `format` after `prefix`, other keys are not looked at.
    ignore: beginnings of keys, after the prefix, that this layer has no part in, such as
    "shared_experts.". Result: new tensors, each of the dtype and on the device it came with.

    ValueError, naming the key with its expected and actual shape: a key that is missing, that this
    layer has no place for, or whose tensor has another shape, is quantised or is no plain tensor.
    """
    operation = "import_state_dict"
    sizes = Sizes.of(layer)
    theirs = places(operation, _format(operation, format), sizes)
    skipped = tuple(prefix + beginning for beginning in ignore)
    given = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix) and not key.startswith(skipped)
    }
    _check(operation, given, theirs, prefix, format)
    return rearranged(sizes, given, FORMATS[format], own_format(sizes))


def export_state_dict(layer: MoE, format: str, prefix: str = "") -> dict[str, Tensor]:
    """The inverse of `import_state_dict`: the parameters of layer as a state dict of `format`, each
    key after `prefix`. New contiguous tensors without gradient, of the layer's dtypes and devices.

    ValueError: an unknown format, or a tensor of the layer that it has no place for.
    """
    theirs, sizes = _format("export_state_dict", format), Sizes.of(layer)
    places("export_state_dict", theirs, sizes)
    made = rearranged(sizes, layer.state_dict(), own_format(sizes), theirs)
    return {prefix + key: tensor for key, tensor in made.items()}


class Sizes(NamedTuple):
    """What a conversion has to know of a layer, or of some of its experts."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    interleaved: bool  # gate_up_layout
    shapes: dict[str, tuple[int, ...]]  # of the tensors that are to be converted, by MoE's names

    @classmethod
    def of(cls, layer: MoE) -> "Sizes":
        experts = layer.options.experts
        return cls(
            layer.num_experts, layer.hidden_size, layer.intermediate_size,
            gate_factor(experts.activation) == 2, experts.gate_up_layout == "interleaved",
            {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()},
        )  # fmt: skip

    def part(self, prefix: str, num_experts: int) -> "Sizes":
        """The tensors whose names begin with prefix, of so many experts."""
        shapes = {
            name: (num_experts, *shape[1:])
            for name, shape in self.shapes.items()
            if name.startswith(prefix)
        }
        return self._replace(num_experts=num_experts, shapes=shapes)


class _Place(NamedTuple):
    """What stands under a key: a tensor of MoE or, of a list, one expert's; and its shape."""

    name: str
    shape: tuple[int, ...]


def _format(operation: str, name: str) -> _Format:
    if name not in FORMATS:
        refuse(operation, "format", f"one of {', '.join(FORMATS)}", name)
    return FORMATS[name]


def own_format(sizes: Sizes) -> _Format:
    """The names of MoE itself."""
    return _Format(
        "router.weight", ("experts.w1",), "experts.w2", "experts.w1",
        router_bias="router.bias", selection_bias="router.selection_bias",
        up_bias="experts.b1", down_bias="experts.b2", interleaved=sizes.interleaved,
    )  # fmt: skip


def _up_keys(form: _Format, sizes: Sizes) -> tuple[str | None, ...]:
    return form.up if sizes.gated else (form.ungated_up,)


def places(operation: str, form: _Format, sizes: Sizes) -> dict[str, _Place]:
    """Every key that the layer has in that format."""
    E, d, n = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    columns = 2 * n if sizes.gated else n
    up = _up_keys(form, sizes)
    rows = columns // len(up)
    wanted: list[tuple[str, str | None, tuple[int, ...]]] = [
        ("router.weight", form.router_weight, (E, d)),
        ("router.bias", form.router_bias, (E,)),
        ("router.selection_bias", form.selection_bias, (E,)),
        *(("experts.w1", key, (E, d, rows) if form.transposed else (E, rows, d)) for key in up),
        ("experts.w2", form.down, (E, n, d) if form.transposed else (E, d, n)),
        ("experts.b1", form.up_bias, (E, columns)),
        ("experts.b2", form.down_bias, (E, d)),
    ]
    found: dict[str, _Place] = {}
    for name, key, shape in wanted:
        if name not in sizes.shapes:
            continue
        if key is None:
            got = list(sizes.shapes[name])
            refuse(operation, name, "none, since the format has no place for it", got)
        if "{}" in key:
            found |= {key.format(expert): _Place(name, shape[1:]) for expert in range(E)}
        else:
            found[key] = _Place(name, shape)
    return found


def _check(
    operation: str,
    given: Mapping[str, Tensor],
    theirs: dict[str, _Place],
    prefix: str,
    format: str,
) -> None:
    for key, (_, shape) in theirs.items():
        expected = f"a tensor of shape {list(shape)}"
        if key not in given:
            raise ValueError(f"{operation}: {prefix}{key}: expected {expected}, got no such key")
        tensor = given[key]
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            refuse(operation, prefix + key, expected, getattr(tensor, "shape", tensor))
        if not is_plain(tensor):
            got = f"{type(tensor).__name__} of {tensor.dtype}"
            refuse(operation, prefix + key, "a plain tensor of floating point numbers", got)
    for key in given:
        if key not in theirs:
            raise ValueError(
                f"{operation}: {prefix}{key}: expected only the keys that this layer has in the "
                f"format {format}, got another (ignore= passes over some)"
            )


def _parts(form: _Format, tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, list[Tensor]]:
    """By the names of MoE: views of the same shapes in the same order, whatever the format."""

    def experts(key: str | None) -> list[Tensor]:
        """Each expert's; none where the layer has none."""
        if key is None:
            return []
        if "{}" in key:
            return [tensors[key.format(expert)] for expert in range(sizes.num_experts)]
        return list(tensors[key]) if key in tensors else []

    def weights(key: str | None) -> list[Tensor]:
        return [weight.T if form.transposed else weight for weight in experts(key)]

    def halves(rows: list[Tensor]) -> list[Tensor]:
        """Of gate and up together: the gates, then the up projections."""
        if form.interleaved:
            return [r[0::2] for r in rows] + [r[1::2] for r in rows]
        return [r.chunk(2)[0] for r in rows] + [r.chunk(2)[1] for r in rows]

    up = _up_keys(form, sizes)
    w1 = [weight for key in up for weight in weights(key)]
    b1 = experts(form.up_bias)
    if sizes.gated:
        w1, b1 = halves(w1) if len(up) == 1 else w1, halves(b1)
    single = {
        "router.weight": form.router_weight,
        "router.bias": form.router_bias,
        "router.selection_bias": form.selection_bias,
    }
    parts = {name: [tensors[key]] for name, key in single.items() if key and key in tensors}
    parts |= {"experts.w1": w1, "experts.w2": weights(form.down)}
    return parts | {"experts.b1": b1, "experts.b2": experts(form.down_bias)}


def rearranged(
    sizes: Sizes, given: Mapping[str, Tensor], source: _Format, target: _Format
) -> dict[str, Tensor]:
    """The same numbers in another format."""
    parts, made = _parts(source, given, sizes), {}
    for key, (name, shape) in places("convert", target, sizes).items():
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts[name]))
        made[key] = torch.empty(shape, dtype=dtype, device=parts[name][0].device)
    copies = _parts(target, made, sizes)
    with torch.no_grad():
        for name, views in copies.items():
            for view, part in zip(views, parts[name], strict=True):
                view.copy_(part)
    return made
