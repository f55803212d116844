"""Expert parallelism by collectives: program_experts.py on two, three and four ranks."""

import program_experts
import pytest
import ranks


@pytest.mark.parametrize("case", ranks.cases(program_experts))
@pytest.mark.parametrize("world", [2, 3, 4])
def test_experts(world, case):
    ranks.check(program_experts, world, case)
