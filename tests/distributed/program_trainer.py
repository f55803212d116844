"""The trainer on two processes against one with the same batches; checkpoints under another
layout."""

import dataclasses
import functools
import random
import tempfile
from pathlib import Path

import numpy as np
import ranks
import torch
import torch.distributed as dist
from comparison import full, same

from trainer import checkpoint, data, parallel, restore
from trainer.config import TrainConfig
from trainer.group import Group
from trainer.layout import Layout
from trainer.model import model_config, new_model
from trainer.signals import Quiet
from trainer.trainer import Text, Trainer

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    name="run", hidden_size=32, intermediate_size=16, layers=2, heads=2, num_experts=8, top_k=2,
    batch_size=4, seq_len=32, steps=8, warmup=2, dtype="float32", vocab_size=280, eval_tokens=96,
)  # fmt: skip
COPIES, FSDP = Layout(), Layout(fsdp=True)


def experts_spread():
    return Layout(ep=2)


@functools.cache
def tokenizer():
    words = random.Random(1).choices(["expert", "router", "token", "row"], k=200)
    return data.train_tokenizer([" ".join(words)], CONFIG.vocab_size)


def everyone():
    return Group(CPU, dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def text(config, group):
    tokens = np.random.default_rng(0).integers(0, 255, 4096)
    return Text(
        tokenizer(), data.Batches(tokens, config, group.rank, group.size),
        data.validation_batches(tokens[-400:], config), 5.0, "0" * 64, "numbers",
    )  # fmt: skip


def trainer(config, layout=None, folder=None):
    """On all processes, or on this one alone where there is no layout."""
    group = everyone() if layout else Group(CPU)
    end = tokenizer().eos_token_id
    if folder:
        shape = model_config(config, len(tokenizer()), end)
        model = restore.load_model(folder, shape)
    else:
        model = new_model(config, len(tokenizer()), end)
    one = Trainer(config, CPU, model, text(config, group), layout=layout, group=group)
    if folder:
        restore.verify(folder)
        one.restore(folder, checkpoint.last_step(folder))
    return one


def steps(one, count):
    """Lines of metrics."""
    lines = []
    for _ in range(count):
        line = one.train_step()
        routing, _ = one.tap.end_step()
        lines.append(line | routing)
    return lines


def parameters(one):
    return {name: full(p.detach()) for name, p in parallel.by_stock_name(one.model).items()}


def close(ours, theirs, rel=1e-5):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "aux_loss", "grad_norm"):
            assert abs(a[name] - b[name]) <= rel * abs(b[name]), (name, a[name], b[name])
        assert a["rows"] == b["rows"] and a["lr"] == b["lr"] and a["tokens"] == b["tokens"]
    assert len({line["loss"] for line in ours}) == len(ours)


def case_losses_and_parameters_are_those_of_one_process():
    """The balance loss counts all tokens; the validation has three sequences for two processes."""
    config = dataclasses.replace(CONFIG, aux_coef=0.5, grad_clip=0.05)
    alone = trainer(config)
    lines, valid = steps(alone, 4), alone.validate()
    assert lines[0]["grad_norm"] > config.grad_clip  # it is clipped
    for layout in (COPIES, FSDP, experts_spread()):
        one = trainer(config, layout)
        close(steps(one, 4), lines, 1e-4)
        assert abs(one.validate() - valid) < 1e-5 * valid
        for name, parameter in parameters(one).items():
            same(parameter, parameters(alone)[name], 1e-3)


def case_bit_for_bit_the_step_of_as_many_parts():
    """Each process has the batch of one part; halving is exact, and so is the sum of two. Nothing
    is clipped, as a norm of shards is summed in another order."""
    config = dataclasses.replace(CONFIG, aux_coef=0.0, grad_clip=1e30)
    alone = trainer(dataclasses.replace(config, batch_size=2, accumulate=2))
    steps(alone, 3)
    for layout in (COPIES, FSDP):
        one = trainer(config, layout)
        steps(one, 3)
        for name, parameter in parameters(one).items():
            assert torch.equal(parameter, parameters(alone)[name]), name


def case_bfloat16():
    """Shards are gathered in bfloat16, where one process casts float32 weights; norms and router
    see the difference."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    lines = steps(trainer(config), 3)
    for layout in (COPIES, FSDP, experts_spread()):
        one = trainer(config, layout)
        close(steps(one, 3), lines, 1e-3)
        dtypes = {p.dtype for p in one.model.parameters()}
        assert dtypes == {torch.float32}


def case_parts_of_a_step():
    config = dataclasses.replace(CONFIG, accumulate=3)
    lines = steps(trainer(config), 2)
    for layout in (COPIES, FSDP, experts_spread()):
        close(steps(trainer(config, layout), 2), lines, 1e-4)


def goes_on(before, after):
    """Three steps and a checkpoint under one layout, three more under another; None: the first
    process alone."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    run = Path(folder[0])
    one = trainer(CONFIG, before)
    steps(one, 3)
    one.validate()  # after which FSDP2 leaves some parameters gathered
    if before or dist.get_rank() == 0:
        checkpoint.save(run, one.content(), one.group)
    dist.barrier()
    again = trainer(CONFIG, after, run)
    assert again.step == 3
    close(steps(again, 3), steps(trainer(CONFIG), 6)[3:], 1e-4)


def case_goes_on_under_another_layout():
    spread = experts_spread()
    for before, after in ((COPIES, spread), (spread, FSDP), (FSDP, None), (None, spread)):
        goes_on(before, after)


def case_stochastic_rounding_is_of_each_process_and_can_go_on():
    config = dataclasses.replace(CONFIG, router="token-rounding", policy="stochastic", tile=16)
    for layout in (FSDP, experts_spread()):
        lines = steps(trainer(config, layout), 3)
        assert lines[0]["rows_dropped"] > 0
        again = trainer(config, layout)
        steps(again, 2)
        torch.manual_seed(99)  # what came between does not count
        assert steps(again, 1)[0] == lines[2]
    drawn = torch.randint(2**62, (1,))
    both = [torch.empty_like(drawn) for _ in range(2)]
    dist.all_gather(both, drawn)
    assert both[0] != both[1]


def case_rows_and_capacity():
    config = dataclasses.replace(CONFIG, seq_len=256, steps=1)
    (line,) = steps(trainer(config, experts_spread()), 1)
    least, mean, most = line["rows_per_process"]
    assert line["rows_over_capacity"] == 0 and least <= mean <= most
    assert 2 * mean == line["rows"] == 4 * 256 * 2 * 2 and least + most == line["rows"]
    (line,) = steps(trainer(config, Layout(ep=2, row_capacity=0.25)), 1)
    kept = 2 * 2 * 256  # layers, processes, a quarter of 1024
    assert line["rows_over_capacity"] == line["rows"] - kept
    (line,) = steps(trainer(config, FSDP), 1)
    assert line["rows_per_process"] == [2048, 2048.0, 2048] and "rows_over_capacity" not in line


def case_samples_and_weights_for_transformers():
    for layout in (COPIES, FSDP, experts_spread()):
        one = trainer(CONFIG, layout)
        steps(one, 1)
        written = one.sample()
        assert len(written) > len(CONFIG.sample_prompt)
        weights = parallel.gathered(one.model, one.group)
        assert bool(weights) == one.group.is_first
        if weights:
            stock = new_model(CONFIG, len(tokenizer()), tokenizer().eos_token_id)
            stock.load_state_dict(weights)


def case_what_fails_on_the_first_process_ends_the_others_quietly():
    group = everyone()

    def full_disk():
        raise OSError(28, "No space left on device")

    try:
        group.share(full_disk)
    except OSError as error:
        assert group.is_first and error.errno == 28
    except Quiet as quiet:
        assert not group.is_first and quiet.exit_code == 1
    else:
        raise AssertionError("nothing was raised")
    assert group.share(lambda: 7) == 7
    assert group.most(dist.get_rank()) == dist.get_world_size() - 1


if __name__ == "__main__":
    ranks.main()
