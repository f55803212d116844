"""Models of transformers under fully_shard (docs/guide/fsdp2.md)."""

import pytest
import ranks
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("torch.distributed is not built", allow_module_level=True)
pytest.importorskip("transformers")

import program_fsdp_transformers


@pytest.mark.parametrize("case", ranks.cases(program_fsdp_transformers))
def test_models_on_two_ranks(case):
    ranks.check(program_fsdp_transformers, 2, case)
