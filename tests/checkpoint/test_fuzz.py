"""A taste of the fuzzing that `python -m tests.helpers.fuzz` does: damaged files end in one sentence."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.helpers.fuzz import TARGETS, check


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=60))
@example(data=b"")
@example(data=b"\xff[")  # nested without end
@example(data=b'\xff{"a":')
@example(data=b"\x00\x00\x00\x00\x00\x00\x00\x00\x00")
def test_damaged_files_end_in_one_sentence(target, data):
    check(target, data)
