"""torchtitan's routed experts over two processes, where torchtitan is installed."""

import pytest
import ranks

pytest.importorskip("torchtitan", "0.3")
pytest.importorskip("triton")

import program_torchtitan


@pytest.mark.parametrize("case", ranks.cases(program_torchtitan))
def test_two_ranks(case):
    ranks.check(program_torchtitan, 2, case)
