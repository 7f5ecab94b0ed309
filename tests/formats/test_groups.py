import math

import pytest
import torch

from atomcli.errors import UsageError
from atomcli.formats import groups
from atomcli.formats.layout import InputLayout


@pytest.mark.parametrize("channels", [1, 127, 128, 448, 576, 577])
def test_groups_cover_all_channels_once(channels: int) -> None:
    count = groups.group_count(channels, 128)
    ids = groups.expand(torch.arange(count), channels, 128)
    assert ids.tolist() == [channel // 128 for channel in range(channels)]
    cut = groups.split(torch.arange(1, channels + 1), 128)
    assert cut.shape == (count, 128)
    assert cut.flatten().tolist() == [*range(1, channels + 1), *[0] * (128 * count - channels)]


def test_a_ragged_group_is_cut_into_powers_of_two() -> None:
    assert groups.hadamard_sizes(448, 128) == [128, 128, 128, 64]
    assert groups.hadamard_sizes(100, 128) == [64, 32, 4]
    assert groups.hadamard_sizes(0, 128) == []


@pytest.mark.parametrize("sizes", [[128, 128, 64], [64, 32, 4], [1], [128], [2, 1]])
def test_hadamard_is_an_orthonormal_involution_of_sylvester_blocks(sizes: list[int]) -> None:
    matrix = groups.apply_hadamard(torch.eye(sum(sizes)), sizes)
    blocks = []
    for size in sizes:
        block = torch.ones(1, 1)
        while block.shape[0] < size:
            block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
        blocks.append(block / math.sqrt(size))
    assert torch.allclose(matrix, torch.block_diag(*blocks), atol=1e-6)
    assert torch.allclose(groups.apply_hadamard(matrix, sizes), torch.eye(sum(sizes)), atol=1e-6)


@pytest.mark.parametrize("in_features", [576, 200])
def test_a_layout_keeps_the_product_and_can_be_undone(in_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, in_features, generator=generator) for rows in (7, 11))
    signs = (torch.randint(0, 2, (in_features,), generator=generator) * 2 - 1).to(torch.int8)
    permutation = torch.randperm(in_features, generator=generator)
    layout = InputLayout(in_features, 64, 128, permutation, signs, hadamard=True)
    assert torch.allclose(layout.apply(x) @ layout.apply(weight).T, x @ weight.T, atol=1e-4)
    assert torch.allclose(layout.invert(layout.apply(x)), x, atol=1e-5)


def test_outliers_stay_apart_from_the_body() -> None:
    layout = InputLayout(192, 64, 128, hadamard=True)
    body_only = torch.cat([torch.randn(128), torch.zeros(64)])
    assert layout.apply(body_only)[128:].abs().max() == 0


def test_a_permutation_of_another_length_is_refused() -> None:
    with pytest.raises(UsageError, match=r"permutation has shape \(5,\)"):
        InputLayout(6, permutation=torch.arange(5))
