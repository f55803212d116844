"""The run of train_small.py on several processes that share parameters and optimizer (FSDP2).

    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 30

Every process holds its part of each parameter, and takes its own batches. `fully_shard` gathers a
block where it is needed: an `sm.MoE` in it is a module as any other.
"""

import argparse
import os

import sonicmoe_cpp as sm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from train_small import Model, batch, read_text


def train(steps=200, size=16):
    """Returns the mean loss over the processes at every step."""
    on_gpu = any(b.name == "cuda" and b.available for b in sm.backends())
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)  # the same weights everywhere, before they are sharded
    model = Model().to(device)
    if on_gpu:
        torch.cuda.set_device(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(dist.get_rank())  # other batches everywhere
    text, losses = read_text(), []
    for step in range(steps):
        inputs, targets = batch(text, size, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            logits, balance = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
        if dist.get_rank() == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"step {step:4}  {losses[-1]:.3f} nats a byte", flush=True)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=16, help="sequences in a process's batch")
    train(**vars(parser.parse_args()))
