"""Folders of transformers written and read by four ranks; by two in docs/guide/checkpoints.md."""

import program_pretrained
import pytest
import ranks


@pytest.mark.parametrize("case", ranks.cases(program_pretrained))
def test_pretrained(case):
    ranks.check(program_pretrained, 4, case)
