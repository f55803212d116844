"""sm.distributed.save_pretrained and load_pretrained on two or four ranks: experts spread over two
of them, shards of FSDP2 over the rest; and the bytes of a rank beside `sonicmoe memory --model`."""

import copy
import functools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import hf_models
import ranks
import safetensors.torch
import sonicmoe_cpp.integrations.transformers as hf
import torch
import torch.distributed as dist
from comparison import full, same
from sonicmoe_cpp import distributed as smd
from sonicmoe_cpp.distributed import pretrained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
INDEX = "model.safetensors.index.json"


@functools.cache
def meshes(ep=2):
    world = dist.get_world_size()
    return (
        init_device_mesh("cpu", (world // ep, ep), mesh_dim_names=("efsdp", "ep")),
        init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",)),
    )


def folder():
    """An empty one, the same on every rank."""
    made = [Path(tempfile.mkdtemp())]
    dist.broadcast_object_list(made)
    return made[0]


class SharedExperts(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.moe, self.shared_experts = hf.to_moe(block), block.shared_experts

    def forward(self, x):
        return self.moe(x) + self.shared_experts(x)


class WithScores(torch.nn.Module):
    """The layers of gpt-oss expect two results."""

    def __init__(self, block):
        super().__init__()
        self.moe = hf.to_moe(block)

    def forward(self, x):
        return self.moe(x), None


def as_moe(block):
    if hasattr(block, "shared_experts"):
        return SharedExperts(block)
    return WithScores(block) if "GptOss" in type(block).__name__ else hf.to_moe(block)


def spread(stock, ep=2, dim=0, shards=True, prepare=as_moe):
    """A copy whose sparse blocks are spread and sharded. prepare(block) gives what takes the place
    of a block."""
    sparse, dense = meshes(ep)
    model = copy.deepcopy(stock)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp = prepare(layer.mlp)
            moe = getattr(layer.mlp, "moe", layer.mlp)
            smd.parallelize_experts(moe, sparse["ep"])
            if shards:
                fully_shard(
                    moe.experts, mesh=sparse["efsdp"],
                    shard_placement_fn=lambda p: Shard(dim if p.dim() > dim else 0),
                )  # fmt: skip
                moe.experts.set_gradient_divide_factor(dist.get_world_size())
                moe.experts.set_force_sum_reduction_for_comms(sparse["efsdp"].size() > 1)
        if shards:
            fully_shard(layer, mesh=dense)
    return fully_shard(model, mesh=dense) if shards else model


def stocks(family, **changes):
    """A model of transformers, and another one of the same sizes."""
    return [hf_models.build(family, **changes).eval() for _ in range(2)]


def equal_to_stock(path, stock):
    """The folder, as transformers loads it."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    loaded = type(stock).from_pretrained(path, **eager)
    theirs = loaded.state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(theirs[name], tensor), name
    ids = torch.randint(3, 64, (2, 8))
    assert torch.equal(loaded.eval()(ids).logits, stock(ids).logits)


def equal_spread(ours, theirs):
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(full(a), full(b)), name


def one_family(family):
    stock, other = stocks(family)
    path = folder()
    saved = spread(stock)
    smd.save_pretrained(saved, path, max_shard_size=20_000)
    assert not (path / ".writing").exists()
    equal_to_stock(path, stock)
    for loaded in (spread(other, dim=1), spread(other, ep=dist.get_world_size(), shards=False)):
        smd.load_pretrained(loaded, path)
        ids = torch.randint(3, 64, (2, 8))
        same(loaded(ids).logits, stock(ids).logits, 1e-4)
        for name, tensor in loaded.state_dict().items():
            if ".experts." not in name and ".router." not in name:
                assert torch.equal(full(tensor), stock.state_dict()[name]), name
    again = folder()
    smd.save_pretrained(loaded, again)  # without FSDP
    equal_to_stock(again, stock)
    return path


def case_qwen3_moe():
    path = one_family("qwen3_moe")
    index = json.loads((path / INDEX).read_text())
    # Each rank's files have its own experts alone; the first rank's also what is no expert.
    for file in set(index["weight_map"].values()):
        names = [name for name, place in index["weight_map"].items() if place == file]
        experts = {int(n.split(".")[5]) for n in names if ".experts." in n}
        assert experts <= set(range(4)) or experts <= set(range(4, 8))
    assert "model.layers.0.mlp.experts.7.gate_proj.weight" in index["weight_map"]
    size = sum(t.nbytes for f in path.glob("*.safetensors") for t in tensors_of(f).values())
    assert index["metadata"]["total_size"] == size > 0


def tensors_of(file):
    return safetensors.torch.load_file(file)


def case_mixtral():
    index = json.loads((one_family("mixtral") / INDEX).read_text())
    assert any(".block_sparse_moe.experts.7.w1." in name for name in index["weight_map"])


def case_gpt_oss():
    one_family("gpt_oss")


def case_deepseek_v3():
    one_family("deepseek_v3")


def case_replaced_blocks_spread():
    for family in ("qwen3_moe", "gpt_oss"):
        stock, other = stocks(family)
        path, replaced = folder(), copy.deepcopy(stock)
        for model in (replaced, other):
            hf.replace_moe_blocks(model)
        saved = spread(replaced, prepare=lambda block: block)
        smd.save_pretrained(saved, path, max_shard_size=20_000)
        equal_to_stock(path, stock)
        loaded = spread(other, ep=dist.get_world_size(), dim=1, prepare=lambda block: block)
        smd.load_pretrained(loaded, path)
        for (name, ours), theirs in zip(
            loaded.state_dict().items(), stock.state_dict().values(), strict=True
        ):
            assert torch.equal(full(ours), theirs), name


def case_blocks_of_transformers_under_fsdp():
    stock, other = stocks("qwen3_moe", tie_word_embeddings=True)
    path, models = folder(), []
    for model in (copy.deepcopy(stock), other):
        hf.replace_moe_blocks(model)
        for layer in model.model.layers:
            fully_shard(layer, mesh=meshes()[1])
        models.append(fully_shard(model, mesh=meshes()[1]))
    smd.save_pretrained(models[0], path)
    equal_to_stock(path, stock)
    smd.load_pretrained(models[1], path)
    equal_spread(*models)


def case_from_the_meta_device():
    stock, _ = stocks("qwen3_moe")
    path = folder()
    if dist.get_rank() == 0:
        stock.save_pretrained(path)
    dist.barrier()
    with torch.device("meta"):
        empty = type(stock)(stock.config)
    model = spread(empty).to_empty(device="cpu").eval()
    for tensor in (*model.parameters(), *model.buffers()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.detach().fill_(7)
    smd.load_pretrained(model, path)
    ids = torch.randint(3, 64, (2, 8))
    same(model(ids).logits, stock(ids).logits, 1e-4)
    moe = model.model.layers[0].mlp
    mine = moe.experts.w1.to_local()
    assert mine.numel() * dist.get_world_size() == moe.experts.w1.numel()


def refused(call, *words):
    """On every rank, with one of two messages."""
    try:
        call()
    except (ValueError, RuntimeError, OSError) as error:
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, str(error))
        assert any(all(word in text for word in words) for text in told), told
        return told
    raise AssertionError("no error on this rank")


def case_an_error_on_one_rank_is_one_on_every_rank():
    stock, other = stocks("qwen3_moe")
    path, model = folder(), spread(stock)
    smd.save_pretrained(model, path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    last = dist.get_world_size() - 1

    def save_file(tensors, file, **options):
        if dist.get_rank() == last:
            raise OSError(28, "No space left on device")
        return real(tensors, file, **options)

    real = safetensors.torch.save_file
    changed = spread(other)
    with mock.patch("safetensors.torch.save_file", save_file):
        told = refused(lambda: smd.save_pretrained(changed, path), "No space left")
    assert told[0].startswith(f"save_pretrained: rank {last} failed: OSError")
    dist.barrier()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    equal_to_stock(path, stock)
    # Whole again, with files of another number.
    smd.save_pretrained(changed, path, max_shard_size=10_000)
    equal_to_stock(path, other)
    dist.barrier()
    if dist.get_rank() == last:
        (path / "config.json").rename(path / "hidden")
    refused(lambda: smd.load_pretrained(model, path), "config.json")


def case_an_interrupted_save_leaves_no_model():
    stock, _ = stocks("mixtral")
    path, model = folder(), spread(stock)
    replace = os.replace

    def killed(source, target):
        if str(target).endswith(INDEX):
            raise OSError("killed")
        replace(source, target)

    remove = mock.patch.object(pretrained.shutil, "rmtree")  # nothing cleans up after a kill
    with mock.patch.object(pretrained.os, "replace", killed), remove:
        refused(lambda: smd.save_pretrained(model, path), "killed")
    assert (path / ".writing").exists()
    try:
        type(stock).from_pretrained(path)
        raise AssertionError("it looks whole")
    except OSError:
        pass
    dist.barrier()
    smd.save_pretrained(model, path)
    equal_to_stock(path, stock)


def case_what_does_not_fit_is_refused():
    stock, _ = stocks("qwen3_moe")
    small, _ = stocks("qwen3_moe", moe_intermediate_size=16)
    fewer, _ = stocks("qwen3_moe", num_hidden_layers=1)
    path = folder()
    if dist.get_rank() == 0:
        stock.save_pretrained(path)
    dist.barrier()
    for model in (small, hf_models.build("qwen3_moe", num_hidden_layers=3)):
        model = spread(model)
        before = [full(p).clone() for p in model.parameters()]
        refused(lambda model=model: smd.load_pretrained(model, path), "load_pretrained: folder:")
        for p, q in zip(model.parameters(), before, strict=True):
            assert torch.equal(full(p), q)
    refused(lambda: smd.save_pretrained(torch.nn.Linear(2, 2), path), "a model of transformers")
    fewer.model.more = torch.nn.Linear(2, 2)
    refused(lambda: smd.save_pretrained(fewer, path), "model.more.weight of shape None")
    with torch.device("meta"):
        empty = type(stock)(stock.config)
    refused(lambda: smd.load_pretrained(empty, path), "to_empty")
    dist.barrier()
    equal_to_stock(path, stock)


# --------------------------------------------------------------------------------- the plan's bytes

COMMAND = Path(os.environ.get("SONICMOE_CLI", ranks.REPOSITORY / "build" / "cli" / "sonicmoe"))


def case_a_rank_has_the_bytes_of_the_plan():
    """Shards of parameters and gradients, AdamW's states, and what forward keeps."""
    if not COMMAND.is_file():
        return
    tokens, world = 256, dist.get_world_size()
    stock = hf_models.build(
        "qwen3_moe", hidden_size=256, head_dim=64, moe_intermediate_size=96, num_experts=16,
        num_experts_per_tok=4, vocab_size=512, max_position_embeddings=512,
    )  # fmt: skip
    stock.set_attn_implementation("sdpa")
    config = folder() / f"{dist.get_rank()}.json"
    stock.config.to_json_file(config)
    told = subprocess.run(
        [COMMAND, "memory", "--model", config, "--gpus", str(world), "--ep", "2", "--json",
         "--tokens", str(tokens), "--dtype", "float32"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    plan = json.loads(told)["layout"]
    ids = torch.randint(3, 512, (1, tokens))
    model = spread(stock)
    optimizer = torch.optim.AdamW(model.parameters())
    model(ids).logits.square().mean().backward()
    optimizer.step()
    moments = [state[f"exp_avg{end}"] for state in optimizer.state.values() for end in ("", "_sq")]
    measured = {
        "parameter_bytes": local_bytes(model.parameters()),
        "gradient_bytes": local_bytes(p.grad for p in model.parameters()),
        "optimizer_bytes": local_bytes(moments),
        "kept_bytes": bytes_kept(spread(stock, shards=False), ids),
    }
    for name, count in measured.items():
        mean = torch.tensor(float(count))
        dist.all_reduce(mean)  # experts are not balanced
        mean = mean.item() / world
        assert abs(mean - plan[name]) < 0.05 * plan[name], (name, mean, plan[name])


def local_bytes(tensors):
    return sum(tensor.to_local().nbytes for tensor in tensors)


def bytes_kept(model, ids):
    """Distinct storages that autograd is handed in one forward, without the weights."""
    plain = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    weights = {p.untyped_storage().data_ptr() for p in plain}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(ids, use_cache=False)
    return sum(kept.values())


if __name__ == "__main__":
    ranks.main()
