"""Expert parallelism by reads of other ranks' memory, on two and three ranks."""

import program_nvlink
import pytest
import ranks


@pytest.mark.parametrize("case", ranks.cases(program_nvlink))
@pytest.mark.parametrize("world", [2, 3])
def test_nvlink(world, case):
    ranks.check(program_nvlink, world, case)
