"""What a sharded model is compared with: one process, on the batches of all ranks."""

import copy

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

Results = tuple[torch.Tensor, dict[str, torch.Tensor | None]]  # outputs; gradients by name


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, gathered wherever it is sharded. Every rank has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(ours: torch.Tensor, right: torch.Tensor, tolerance: float = 0.0, name: str = "") -> None:
    """Equal, or within tolerance * max |right|. The tolerance has to be one that zeros, two
    exchanged halves (ranks) and a dropped expert (of a tensor so named) would fail."""
    ours, right = full(ours.detach()).double(), right.detach().double()
    assert ours.shape == right.shape, name
    allowed = tolerance * right.abs().max()
    halves = torch.atleast_1d(right).chunk(2)
    assert right.abs().max() > allowed, f"{name}: zeros would pass"
    if "experts" in name:
        rows = right.flatten(1).abs().amax(1)
        assert rows[rows > 0].min() > allowed, f"{name}: a dropped expert would pass"
    if len(halves) == 2 and halves[0].shape == halves[1].shape:
        assert (halves[0] - halves[1]).abs().max() > allowed, f"{name}: swapped ranks would pass"
    error = (ours - right).abs().max()
    assert error <= allowed, f"{name}: error {error / right.abs().max():.2e} of the largest value"


def step(model: torch.nn.Module, x: torch.Tensor, tokens: int | None = None) -> Results:
    """Forward and backward of the mean over all `tokens`, those of x by default, of squares."""
    model.zero_grad()
    y = model(x)
    y.float().square().sum().div(tokens or x.shape[0]).backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


def mean_of(gradients: list[dict]) -> dict:
    """As FSDP means them, in float32: by summation in the order of the ranks."""
    first, *others = gradients
    return {
        name: None if grad is None
        else sum((each[name].float() for each in others), grad.float()) / len(gradients)
        for name, grad in first.items()
    }  # fmt: skip


def compare(ours: Results, plain: torch.nn.Module, batches: torch.Tensor) -> None:
    """One step of this rank on batches[rank], with that of a plain model. Outputs and the mean of
    two ranks' gradients are equal bit for bit; sums over more ranks, and gradients of one process
    that has all batches at once, add in another order: 1e-5."""
    parts = [step(copy.deepcopy(plain), x) for x in batches]
    y, gradients = ours
    same(y, parts[dist.get_rank()][0], name="y")
    if len(parts) == 2:
        compare_gradients(gradients, mean_of([part[1] for part in parts]))
    compare_gradients(gradients, step(copy.deepcopy(plain), batches.flatten(0, 1))[1], 1e-5)


def compare_gradients(ours: dict, right: dict, tolerance: float = 0.0) -> None:
    assert len(ours) == len(right) > 0
    for (name, mine), theirs in zip(ours.items(), right.values(), strict=True):
        assert (mine is None) == (theirs is None), name
        if theirs is not None:
            same(mine, theirs, tolerance, name)
