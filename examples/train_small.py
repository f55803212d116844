"""A small Mixture-of-Experts language model in plain PyTorch: the next byte of Python source code.

    python examples/train_small.py              # seconds on two cores
    python examples/train_small.py --steps 30

On a Hopper GPU it trains there, in bfloat16. Every block is attention followed by `sm.MoE`; the
rest is an ordinary training loop: AdamW, a load-balancing loss beside the cross-entropy.
"""

import argparse
import inspect
from pathlib import Path

import sonicmoe_cpp as sm
import torch
import torch.nn.functional as F
from torch import nn

CONTEXT, WIDTH, HEADS, BLOCKS = 64, 128, 4, 2
EXPERTS, TOP_K = 16, 2


class Block(nn.Module):
    """x [B, S, WIDTH]: causal attention, then the experts; both added to their input."""

    def __init__(self):
        super().__init__()
        self.attention_norm, self.experts_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.moe = sm.MoE(WIDTH, WIDTH, num_experts=EXPERTS, top_k=TOP_K)

    def attention(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        y, logits, rows_per_expert = self.moe(self.experts_norm(x), return_router=True)
        return x + y, sm.load_balancing_loss(logits, rows_per_expert, top_k=TOP_K)


class Model(nn.Module):
    """bytes [B, S] -> logits [B, S, 256] and the mean load-balancing loss."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        balance = 0.0
        for block in self.blocks:
            x, loss = block(x)
            balance = balance + loss / BLOCKS
        return self.head(self.norm(x)), balance


def read_text():
    """Bytes [N] of Python source code."""
    source = Path(inspect.getsourcefile(argparse)).read_bytes()
    return torch.frombuffer(bytearray(source), dtype=torch.uint8)


def batch(text, size, device):
    """Random windows of text [N], as inputs and the bytes that follow: two of [size, CONTEXT]."""
    start = torch.randint(len(text) - CONTEXT, (size, 1))
    windows = text[start + torch.arange(CONTEXT + 1)].long().to(device)
    return windows[:, :-1], windows[:, 1:]


def train(steps=200, size=32, seed=0, new_model=Model):
    """Trains a model; returns the cross-entropy of every step, in nats per byte."""
    torch.manual_seed(seed)
    on_gpu = any(b.name == "cuda" and b.available for b in sm.backends())
    device = torch.device("cuda" if on_gpu else "cpu")
    text = read_text()
    model = new_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        inputs, targets = batch(text, size, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            logits, balance = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4}  {losses[-1]:.3f} nats a byte")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    train(parser.parse_args().steps)
