"""fully_shard on several ranks computes what one process does (docs/guide/fsdp2.md)."""

import pytest
import ranks
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("torch.distributed is not built", allow_module_level=True)

import program_fsdp
import program_meshes


@pytest.mark.parametrize("case", ranks.cases(program_fsdp))
def test_the_layer_on_two_ranks(case):
    ranks.check(program_fsdp, 2, case)


@pytest.mark.parametrize("case", ranks.cases(program_meshes))
def test_two_meshes_on_four_ranks(case):
    ranks.check(program_meshes, 4, case)
