"""Thresholds that turn an evaluation into a gate for CI: met, or a ThresholdError with measured value and limit."""

import math

from atomcli.errors import ThresholdError, UsageError
from atomcli.evaluation.divergence import Divergence


def check_gates(result: Divergence, max_ratio: float | None = None, max_kld: float | None = None) -> None:
    """Every gate that was asked for, against one result; all that fail are named in one ThresholdError."""
    failures = [
        sentence
        for sentence in (
            _failure("the perplexity ratio to the parent", result.perplexity_ratio, max_ratio, "--max-ratio", low=1.0),
            _failure("the mean KL divergence to the parent", result.mean_kld, max_kld, "--max-kld", low=0.0),
        )
        if sentence
    ]
    if failures:
        raise ThresholdError("; ".join(failures))


def check_ratio(ratio: float, limit: float | None) -> None:
    """ThresholdError when a perplexity ratio to the parent exceeds the limit."""
    sentence = _failure("the perplexity ratio to the parent", ratio, limit, "--max-ratio", low=1.0)
    if sentence:
        raise ThresholdError(sentence)


def check_kld(kld: float, limit: float | None) -> None:
    """ThresholdError when a mean KL divergence to the parent exceeds the limit."""
    sentence = _failure("the mean KL divergence to the parent", kld, limit, "--max-kld", low=0.0)
    if sentence:
        raise ThresholdError(sentence)


def _failure(what: str, value: float, limit: float | None, option: str, low: float) -> str | None:
    """What to say when the gate is not met, None when it is; UsageError for a limit that is not a number."""
    if limit is None:
        return None
    if not math.isfinite(limit) or limit < 0:
        raise UsageError(f"{option} {limit} is no limit; give a finite number, usually a little above {low:g}")
    # Written so that NaN fails.
    return None if value <= limit else f"{what} is {value:.4f}, above the limit {limit:g}"
