"""What the ranks hold, put together again, is the linear: no tensor parallelism may change a number."""

import pytest
import torch

from atomcli.formats.scheme import SCHEMES
from atomcli.formats.weights import QuantizedWeight
from atomcli.integrations.vllm.sharding import WHOLE, tensor_part
from tests.helpers.checkpoints import random_weight

ROWS = 12


@pytest.mark.parametrize("columns", [512, 648, 1152])
@pytest.mark.parametrize("bounds", [[(0, 4), (4, 8), (8, 12)], [(0, 6), (6, 12)], [(0, 12)]])
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_rows_of_all_ranks_are_the_weight(name: str, bounds: list[tuple[int, int]], columns: int) -> None:
    weight = random_weight(name, ROWS, columns)
    parts = []
    for rows in bounds:
        tensors = {suffix: tensor_part(suffix, tensor, rows) for suffix, tensor in weight.tensors().items()}
        part = QuantizedWeight.from_tensors(weight.scheme, (rows[1] - rows[0], columns), tensors)
        parts.append(part.dequantize())
    assert torch.equal(torch.cat(parts), weight.dequantize())


@pytest.mark.parametrize("suffix", WHOLE)
def test_what_belongs_to_all_rows_is_not_cut(suffix: str) -> None:
    tensor = torch.arange(ROWS)
    assert tensor_part(suffix, tensor, (4, 8)) is tensor
    assert tensor_part("weight_scale", tensor, (4, 8)).tolist() == [4, 5, 6, 7]
