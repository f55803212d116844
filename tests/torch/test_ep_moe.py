"""The operators of an exchange, with one rank: opcheck, and the bits of moe."""

import pytest
import sonicmoe_cpp as sm
import torch
from sonicmoe_cpp import _ep_moe
from sonicmoe_cpp._library import ops
from sonicmoe_cpp.options import packed_experts
from torch.library import opcheck

T, D, N, E, K = 6, 16, 8, 4, 2
OPTIONS = packed_experts("moe", max_rows=9)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.fixture
def exchange():
    like, sizes = torch.empty(1), [1, T + 3, D, E, K]
    memory = torch.empty(ops.exchange_bytes(like, sizes) + 128, dtype=torch.uint8)
    address = -(-memory.data_ptr() // 128) * 128
    handle = ops.exchange_open(like, sizes, 0, [address], 10.0)
    _ep_moe.NUM_PLACES[handle] = T + 3
    yield handle
    del _ep_moe.NUM_PLACES[handle]
    ops.exchange_close(handle)


def inputs(requires_grad=False):
    """x, ids, weights, w1, b1, w2, b2."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((T, D), (T, K), (E, 2 * N, D), (E, 2 * N), (E, D, N), (E, D))
    x, weights, *experts = (torch.randn(shape, generator=generator) for shape in shapes)
    for tensor in (x, weights, *experts):
        tensor.requires_grad_(requires_grad)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    return x, ids, weights, *experts


@pytest.mark.parametrize("save, keep", [(False, False), (True, False), (True, True)])
def test_opcheck(exchange, save, keep):
    x, *others = inputs(requires_grad=save)
    opcheck(ops.ep_moe_forward, (x, exchange, *others, *OPTIONS, save, keep), test_utils=CHECKS)
    if not save:
        return
    x, *others = inputs()
    y, *saved, _ = ops.ep_moe_forward(x, exchange, *others, *OPTIONS, True, keep)
    for needs in ((True,) * 4, (False, True, True, False)):
        backward = (y, x, exchange, *others, saved, *OPTIONS, needs)
        opcheck(ops.ep_moe_backward, backward, test_utils=CHECKS)


def test_one_rank_is_moe(exchange):
    x, ids, weights, w1, b1, w2, b2 = given = inputs(requires_grad=True)
    y, *_, dropped = ops.ep_moe_forward(
        x, exchange, ids, weights, w1, b1, w2, b2, *OPTIONS, True, False
    )
    count = torch.zeros(1, dtype=torch.int32)
    right = sm.moe(x, w1, w2, ids, weights, b1=b1, b2=b2, max_rows=9, rows_dropped=count)
    assert torch.equal(y, right)
    assert dropped.item() == count.item() == T * K - 9
    leaves = [tensor for tensor in given if tensor.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(y.square().sum(), leaves),
        torch.autograd.grad(right.square().sum(), leaves),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_closed_exchange_is_refused(exchange):
    x, *others = inputs()
    with pytest.raises(RuntimeError, match="exchange: expected one that is open, got 99999"):
        ops.ep_moe_forward(x, 99999, *others, *OPTIONS, False, False)
    with pytest.raises(RuntimeError, match="exchange_bytes: num_experts: expected a multiple of"):
        ops.exchange_bytes(torch.empty(1), [2, T, D, 3, K])
    with pytest.raises(RuntimeError, match="sizes: expected 5 elements, got 1"):
        ops.exchange_bytes(torch.empty(1), [2])
