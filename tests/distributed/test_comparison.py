"""What same() and compare_gradients() reject."""

import pytest
import torch
from comparison import compare_gradients, same

RIGHT = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))


def swapped(tensor):
    return torch.cat(tensor.chunk(2)[::-1])


def without_an_expert(tensor):
    return torch.cat((tensor[:1], torch.zeros_like(tensor[1:2]), tensor[2:]))


WRONG = (torch.zeros_like, swapped, without_an_expert, lambda t: t + float("nan"), lambda t: t[:2])


@pytest.mark.parametrize("tolerance", [0, 1e-5, 0.05])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong(wrong, tolerance):
    same(RIGHT.clone(), RIGHT, tolerance, "experts")
    with pytest.raises(AssertionError):
        same(wrong(RIGHT), RIGHT, tolerance, "experts")


def test_one_bit():
    other = RIGHT.clone()
    other[2, 1, 0] = torch.nextafter(other[2, 1, 0], torch.tensor(9.0))
    with pytest.raises(AssertionError, match="w: error"):
        same(other, RIGHT, name="w")
    same(other, RIGHT, 1e-5)


def test_a_comparison_that_could_not_fail_is_none():
    with pytest.raises(AssertionError, match="zeros would pass"):
        same(torch.zeros(4), torch.zeros(4))
    with pytest.raises(AssertionError, match="swapped ranks would pass"):
        same(torch.ones(4), torch.ones(4), 1e-5)
    small = RIGHT * torch.tensor([1, 1, 1e-6, 1])[:, None, None]
    same(small, small, 1e-5)
    with pytest.raises(AssertionError, match="a dropped expert would pass"):
        same(small, small, 1e-5, "experts.w1")


def test_gradients_that_are_missing():
    compare_gradients({"w": RIGHT, "frozen": None}, {"w": RIGHT, "frozen": None})
    for ours in ({"w": RIGHT}, {"w": RIGHT, "frozen": RIGHT}, {"w": None, "frozen": None}):
        with pytest.raises(AssertionError):
            compare_gradients(ours, {"w": RIGHT, "frozen": None})
