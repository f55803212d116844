"""Expert parallelism by collectives, on two, three and four ranks."""

import program_experts
import program_experts_sharded
import pytest
import ranks


@pytest.mark.parametrize("case", ranks.cases(program_experts))
@pytest.mark.parametrize("world", [2, 3, 4])
def test_experts(world, case):
    ranks.check(program_experts, world, case)


@pytest.mark.parametrize("case", ranks.cases(program_experts_sharded))
def test_experts_sharded(case):
    ranks.check(program_experts_sharded, 4, case)
