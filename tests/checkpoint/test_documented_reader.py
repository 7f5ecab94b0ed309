"""docs/checkpoint.md, taken at its word by a reader that knows nothing of our code."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atomcli.formats.scheme import SCHEMES
from atomcli.formats.weights import tensor_layout
from tests.helpers.checkpoints import LINEARS, input_layout, random_weight, write_checkpoint

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoint.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read_linear() -> Callable[[Path, str], torch.Tensor]:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert "atomcli" not in code
    namespace: dict[str, Any] = {}
    exec(compile(code, "checkpoint.md", "exec"), namespace)
    return namespace["read_linear"]


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_the_documented_reader_reads_every_scheme(
    tmp_path: Path, read_linear: Callable[[Path, str], torch.Tensor], scheme: str
) -> None:
    checkpoint = write_checkpoint(tmp_path / "out", scheme)
    for block, (linear, (rows, columns)) in enumerate(LINEARS.items()):
        ours = random_weight(scheme, rows, columns, seed=block).dequantize()
        expected = input_layout(scheme, columns).invert(ours)
        found = read_linear(checkpoint, linear)
        assert found.shape == (rows, columns)
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert expected.abs().max() > 0


def test_every_tensor_is_documented() -> None:
    described = {
        (suffix, dtype) for suffix, dtype in re.findall(r"^\| `(\w+)` \| ([\w' ]+?) \|", PAGE, flags=re.MULTILINE)
    }
    for name, scheme in SCHEMES.items():
        for spec in tensor_layout(scheme, 8, 400):
            dtype = "the parent's" if spec.suffix == "weight" else str(spec.dtype).removeprefix("torch.")
            assert (spec.suffix, dtype) in described, f"{spec.suffix} of {name}"


def test_the_examples_are_json_of_real_schemes() -> None:
    config, manifest = (json.loads(text) for text in re.findall(r"^```json\n(.*?)^```$", PAGE, flags=re.S | re.M))
    assert config["schemes"]["w4a4-g128-o128"] == SCHEMES["atom-paper"].to_dict()
    assert manifest["version"] == config["version"] == 1
