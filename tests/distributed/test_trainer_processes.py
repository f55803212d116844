"""The trainer on two and four processes against one."""

import program_trainer
import program_trainer_four
import pytest
import ranks


@pytest.mark.parametrize("case", ranks.cases(program_trainer))
def test_two_processes(case):
    ranks.check(program_trainer, 2, case)


@pytest.mark.parametrize("case", ranks.cases(program_trainer_four))
def test_four_processes(case):
    ranks.check(program_trainer_four, 4, case)
