"""The run of train_small.py with a router of your own: `sm.moe` takes the experts' ids and weights.

    python examples/own_router.py --steps 60

This router adds noise to its logits while it trains, and weighs the chosen experts by sigmoids.
"""

import argparse

import sonicmoe_cpp as sm
import torch
import train_small
from torch import nn
from train_small import EXPERTS, TOP_K, WIDTH


class NoisyMoE(nn.Module):
    """x [..., hidden_size] -> y of its shape. Routing is ordinary PyTorch: autograd goes through
    the weights to the router."""

    def __init__(self, hidden_size, intermediate_size, num_experts, top_k, noise=0.3):
        super().__init__()
        self.num_experts, self.top_k, self.noise = num_experts, top_k, noise
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for weight in (self.w1, self.w2):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, x, return_router=False):
        logits = self.router(x).float()
        noise = self.noise * torch.randn_like(logits) if self.training else 0.0
        ids = (logits + noise).topk(self.top_k).indices
        weights = logits.gather(-1, ids).sigmoid()
        weights = weights / weights.sum(-1, keepdim=True)
        y = sm.moe(x, self.w1, self.w2, ids, weights)
        rows_per_expert = ids.flatten().bincount(minlength=self.num_experts).int()
        return (y, logits, rows_per_expert) if return_router else y


def new_model():
    """The model of train_small.py with this layer in every block."""
    model = train_small.Model()
    for block in model.blocks:
        block.moe = NoisyMoE(WIDTH, WIDTH, num_experts=EXPERTS, top_k=TOP_K)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    train_small.train(parser.parse_args().steps, new_model=new_model)
