"""Folders of transformers written and read by four ranks; by two in docs/guide/distributed.md."""

import program_pretrained
import pytest
import ranks


@pytest.mark.parametrize("case", ranks.cases(program_pretrained))
def test_pretrained(case):
    if "plan" in case and not program_pretrained.COMMAND.is_file():
        pytest.skip("the command is not built")
    ranks.check(program_pretrained, 4, case)
