"""Gates pass at the limit, fail above it with both numbers, and never pass by accident."""

import math

import pytest

from atomcli.errors import ThresholdError, UsageError
from atomcli.evaluation.gates import check_gates


def test_met_at_the_limit_and_without_limits() -> None:
    check_gates(ratio=1.4, max_ratio=1.4, kld=0.1, max_kld=0.1)
    check_gates(ratio=99.0, kld=99.0)


def test_failures_name_value_and_limit() -> None:
    with pytest.raises(ThresholdError, match=r"perplexity ratio to the parent is 1\.4321, above the limit 1\.4$"):
        check_gates(ratio=1.43211, max_ratio=1.4)
    with pytest.raises(ThresholdError, match=r"ratio .* is 2\.0000, above the limit 1; .*divergence .* 0\.5000.* 0\.1"):
        check_gates(ratio=2.0, max_ratio=1.0, kld=0.5, max_kld=0.1)
    assert ThresholdError.exit_code == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_measurement_fails(value: float) -> None:
    with pytest.raises(ThresholdError):
        check_gates(ratio=value, max_ratio=1.4)
    with pytest.raises(ThresholdError):
        check_gates(kld=value, max_kld=1.4)


def test_a_gate_without_a_value_or_with_a_senseless_limit_is_refused() -> None:
    with pytest.raises(UsageError, match="not measured"):
        check_gates(max_kld=0.1)
    for limit in (math.nan, -1.0, math.inf):
        with pytest.raises(UsageError, match="--max-ratio"):
            check_gates(ratio=1.0, max_ratio=limit)
