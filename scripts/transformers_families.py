"""Which families of transformers run their experts on this library: tries each, says what it saw.

    python scripts/transformers_families.py               # prints the table
    python scripts/transformers_families.py --write       # into the page
    python scripts/transformers_families.py qwen3_moe     # one family

A family is a folder of transformers.models with an experts module behind the experts interface. Of
each a small random model is built and run twice, on "eager" and on "sonicmoe_cpp": same outputs and
same gradients of every parameter, to 1e-4 of the largest value.
"""

import argparse
import dataclasses
import importlib
import inspect
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import sonicmoe_cpp.integrations.transformers as hf
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

PAGE = Path(__file__).resolve().parents[1] / "docs/guide/transformers-families.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
TOLERANCE = 1e-4
DECORATED = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", re.MULTILINE)
EXPERTS, HIDDEN, WIDTH = 8, 32, 24
LARGEST = 8_000_000  # parameters of a small model

# Whatever a configuration calls its sizes. Those that it does not have are left out.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), 64),
    **dict.fromkeys(("hidden_size",), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), WIDTH),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), WIDTH),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("moe_num_experts", "num_routed_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("num_hidden_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "first_k_dense"), 0),
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What one family needs beyond that.
FAMILY: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["sparse", "sparse"]},
    "flint": {"mlp_only_layers": []},
    "deepseek_ocr2": {"mlp_layer_types": ["sparse", "sparse"]},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [WIDTH, WIDTH], "mlp_layer_types": ["sparse", "sparse"],
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "gemma4": {
        "enable_moe_block": True, "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8, "global_head_dim": 8,
    },
    "glm4v_moe": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
    },
    "glm5_next": {
        "qk_rope_head_dim": 0, "head_dim": 0, "index_head_dim": 8, "index_n_heads": 2,
        "mlp_layer_types": ["sparse", "sparse"],
        "linear_head_dim": 8, "linear_num_heads": 4, "index_topk": 8, "index_kpool": 4,
    },
    "hy_v4_vl": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "dots1": {"n_shared_experts": 1},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"layer_types": ["full_attention", "full_attention"]},
}  # fmt: skip


@dataclasses.dataclass
class Seen:
    family: str
    scope: str  # "model" | "no model"
    refusal: str | None = None  # ours, in its words
    error: float = float("nan")  # the largest of outputs and gradients, relative
    note: str = ""  # why no model

    @property
    def equal(self) -> bool:
        return self.error <= TOLERANCE


def families() -> dict[str, list[str]]:
    """Folder of transformers.models -> names of its experts classes."""
    root = Path(transformers.__file__).parent / "models"
    found = {}
    for file in sorted(root.glob("*/modeling_*.py")):
        names = DECORATED.findall(file.read_text())
        if names:
            found[file.parent.name] = names
    return found


def modeling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def candidates(family: str) -> list[type]:
    """Model classes, those with a loss over tokens first."""
    module = modeling(family)
    own = [
        c for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, transformers.PreTrainedModel)
        and c.__module__ == module.__name__ and not c.__name__.endswith("PreTrainedModel")
        and inspect.isclass(c.config_class)
    ]  # fmt: skip
    order = ("ForCausalLM", "TextModel", "Model")
    own = [c for c in own if not re.search("Vision|Audio", c.__name__)]
    rank = {c: next((i for i, end in enumerate(order) if c.__name__.endswith(end)), 9) for c in own}
    return sorted((c for c in own if rank[c] < 9), key=lambda c: rank[c])


def configuration(cls: Any, changes: dict[str, Any]) -> Any:
    known = (
        set(inspect.signature(cls.__init__).parameters)
        | set(vars(cls))
        | set(getattr(cls, "__dataclass_fields__", ()))
    )
    small = {name: value for name, value in SMALL.items() if name in known}
    config = cls(**(small | changes))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def build(family: str) -> nn.Module:
    """A small random model in float32 with an experts module in it."""
    experts = tuple(getattr(modeling(family), name) for name in families()[family])
    failures = []
    for cls in candidates(family):
        try:
            config = configuration(cls.config_class, FAMILY.get(family, {}))
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > LARGEST:
                raise ValueError(
                    f"{cls.__name__} has {size} parameters: its sizes are not all known"
                )
            torch.manual_seed(0)
            model = cls(config).float()
            blocks = [m for m in model.modules() if isinstance(m, experts)]
            if not blocks:
                raise ValueError(f"{cls.__name__} has no experts module")
            randomise(model, blocks)
            run(model, "eager")
            return model
        except Exception as error:
            failures.append(
                f"{cls.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
    raise LookupError("; ".join(failures) or "no class")


def randomise(model: nn.Module, blocks: list) -> None:
    """Realistic magnitudes: what is drawn at 0.02 makes every expert nearly zero."""
    with torch.no_grad():
        for parameter in {p for block in blocks for p in block.parameters()}:
            parameter.normal_(std=0.3)


def run(model: Any, implementation: str) -> tuple[Tensor, dict[str, Tensor], int]:
    """Output, gradients, and how often the library was called."""
    calls = 0

    def counted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return hf.experts_forward(*arguments)

    ALL_EXPERTS_FUNCTIONS.register("sonicmoe_cpp", counted)
    model.set_experts_implementation(implementation)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.zero_grad()
    torch.manual_seed(1)
    ids = torch.randint(3, 64, (2, 12))
    output = model(input_ids=ids, use_cache=False)[0]
    (output * torch.randn(output.shape)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    hf.register()
    return output.detach(), grads, calls


def difference(ours: Tensor, theirs: Tensor) -> float:
    size = float(theirs.abs().max())
    if size == 0:
        return float(ours.abs().max())
    return float((ours - theirs).abs().max()) / size


def compared(ours: tuple, theirs: tuple) -> float:
    (y, grads, calls), (right, right_grads, _) = ours, theirs
    if calls == 0:
        raise AssertionError("the experts interface was not called")
    if grads.keys() != right_grads.keys() or not right.abs().max() > 0:
        raise AssertionError("other parameters have gradients, or the output is zero")
    return max(difference(y, right), *(difference(grads[n], right_grads[n]) for n in grads))


def see(family: str) -> Seen:
    try:
        model = build(family)
    except LookupError as error:
        return Seen(family, "no model", note=str(error))
    theirs = run(model, "eager")
    try:
        return Seen(family, "model", error=compared(run(model, "sonicmoe_cpp"), theirs))
    except ValueError as error:
        return Seen(family, "model", refusal=str(error))


def name_of(error: str) -> str:
    """What of an experts module was refused: the error without the module's path."""
    return error.split(".", 1)[1].replace("|", "\\|")


def table(seen: list[Seen]) -> list[str]:
    equal = [one for one in seen if one.equal]
    refused = [one for one in seen if one.refusal is not None]
    left = [one for one in seen if one not in equal and one not in refused]
    worst = max((one.error for one in equal), default=0.0)
    names = ", ".join(one.family for one in equal)
    lines = [f"**Equal: {len(equal)}**, the largest difference {worst:.1e}.", ""]
    lines += textwrap.wrap(names + ".", 100)
    lines += [
        "",
        f"**Refused: {len(refused)}**, in these words:",
        "",
        "| family | refusal |",
        "|---|---|",
    ]
    lines += [f"| {one.family} | `{name_of(str(one.refusal))}` |" for one in refused]
    if left:
        lines += ["", f"**Neither: {len(left)}**:", "", "| family | what was seen |", "|---|---|"]
        lines += [f"| {one.family} | {what_was_seen(one)} |" for one in left]
    return lines


def what_was_seen(one: Seen) -> str:
    if one.scope == "model":
        return f"differs by {one.error:.1e}"
    return "no small model of it could be built: " + one.note.split(";")[0].replace("|", "\\|")


def with_table(page: str, lines: list[str]) -> str:
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return "\n".join((before + BEGIN, "", *lines, "", END + after))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", nargs="*")
    parser.add_argument("--write", action="store_true", help="into the page")
    arguments = parser.parse_args()
    seen = []
    for family in arguments.family or families():
        seen.append(see(family))
        print(seen[-1], file=sys.stderr, flush=True)
    lines = table(seen)
    print("\n".join(lines))
    if arguments.write:
        PAGE.write_text(with_table(PAGE.read_text(), lines))


if __name__ == "__main__":
    main()
