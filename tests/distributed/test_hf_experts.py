"""Experts of transformers' models, spread over processes."""

import pytest
import ranks
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("torch.distributed is not built", allow_module_level=True)
pytest.importorskip("transformers", "5.23")

import program_hf_experts
import program_hf_experts_pairs


@pytest.mark.parametrize("case", ranks.cases(program_hf_experts))
def test_two_ranks(case):
    ranks.check(program_hf_experts, 2, case)


@pytest.mark.parametrize("case", ranks.cases(program_hf_experts_pairs))
def test_four_ranks(case):
    ranks.check(program_hf_experts_pairs, 4, case)
