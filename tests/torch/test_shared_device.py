"""Whether the GPU is taken for shared: set by hand, or told by the process group."""

from types import SimpleNamespace

import pytest
import sonicmoe_cpp as sm
import torch
import torch.distributed as dist
from sonicmoe_cpp import _shared_device
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

told = torch.ops.sonicmoe_cpp.is_shared_device
ON_GPU = SimpleNamespace(is_cuda=True)


@pytest.fixture(autouse=True)
def own_setting():
    yield
    sm.set_shared_device(None)
    _shared_device.tell_library(ON_GPU)
    assert not told()


@pytest.fixture
def two_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_a_process_group_of_several_ranks_shares_the_gpu(two_ranks):
    _shared_device.tell_library(ON_GPU)
    assert told()


def test_the_setting_goes_before_the_process_group(two_ranks):
    sm.set_shared_device(False)
    _shared_device.tell_library(ON_GPU)
    assert not told()


def test_one_rank_shares_nothing_unless_told():
    _shared_device.tell_library(ON_GPU)
    assert not told()
    sm.set_shared_device(True)
    assert not told()  # before the next call
    _shared_device.tell_library(ON_GPU)
    assert told()


def test_calls_on_the_cpu_and_traced_ones_tell_nothing():
    sm.set_shared_device(True)
    layer = sm.MoE(hidden_size=8, intermediate_size=8, num_experts=2, top_k=1)
    layer(torch.randn(4, 8)).sum().backward()
    assert not told()
    with FakeTensorMode():
        _shared_device.tell_library(ON_GPU)
    assert not told()
    _shared_device.tell_library(ON_GPU)  # nor do they count as told
    assert told()


@pytest.mark.parametrize("value", [1, "yes", torch.tensor(True)])
def test_refuses_what_is_no_flag(value):
    with pytest.raises(ValueError, match=r"set_shared_device: shared: expected .*, got"):
        sm.set_shared_device(value)
