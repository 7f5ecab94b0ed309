"""Thresholds that turn an evaluation into a gate for CI: met, or a ThresholdError with measured value and limit."""

import math

from atomcli.errors import ThresholdError, UsageError


def check_gates(
    ratio: float | None = None,
    max_ratio: float | None = None,
    kld: float | None = None,
    max_kld: float | None = None,
) -> None:
    """Compare the perplexity ratio and the mean KL divergence (nats) to the parent with the limits that were given.

    Every gate that fails is named in one ThresholdError. A gate without a measured value is a UsageError: it would
    pass by never being looked at.
    """
    gates = (
        ("the perplexity ratio to the parent", ratio, "--max-ratio", max_ratio),
        ("the mean KL divergence to the parent", kld, "--max-kld", max_kld),
    )
    failures = []
    for what, value, option, limit in gates:
        if limit is None:
            continue
        if not math.isfinite(limit) or limit < 0:
            raise UsageError(f"{option} {limit} is no limit; it must be a finite number of at least 0")
        if value is None:
            raise UsageError(f"{option} needs {what}, which was not measured", "Add --against PARENT")
        if not value <= limit:  # so that NaN fails
            failures.append(f"{what} is {value:.4f}, above the limit {limit:g}")
    if failures:
        message = "; ".join(failures)
        raise ThresholdError(message[0].upper() + message[1:])
