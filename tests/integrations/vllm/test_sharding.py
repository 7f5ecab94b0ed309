"""What the ranks hold, put together again, is the linear: no tensor parallelism may change a number."""

import pytest
import torch

from atomcli.errors import UnsupportedError
from atomcli.formats.activations import quantize_activations
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import SCHEMES, ActivationFormat, Scheme, WeightFormat
from atomcli.formats.weights import QuantizedWeight
from atomcli.integrations.vllm.sharding import Part, column_part, slice_operand, split_rows, tensor_part
from atomcli.kernels.quantize import KernelLayout, Operand
from tests.helpers.checkpoints import random_weight

NAMES = sorted(SCHEMES)
ROWS = 12


def weight_of_part(weight: QuantizedWeight, part: Part) -> QuantizedWeight:
    scheme, (_, columns) = part.scheme(weight.scheme), weight.shape
    tensors = {suffix: tensor_part(suffix, t, weight.scheme, columns, part) for suffix, t in weight.tensors().items()}
    tensors = {suffix: t for suffix, t in tensors.items() if part.outliers or "outlier" not in suffix}
    return QuantizedWeight.from_tensors(scheme, (part.rows[1] - part.rows[0], part.in_features(weight.scheme)), tensors)


@pytest.mark.parametrize("columns", [512, 648, 1152])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_all_ranks_are_the_weight(name: str, columns: int) -> None:
    weight = random_weight(name, ROWS, columns)
    bounds = [(0, 4), (4, 8), (8, 12)]
    parts = [weight_of_part(weight, column_part(weight.scheme, columns, rows)).dequantize() for rows in bounds]
    assert torch.equal(torch.cat(parts), weight.dequantize())


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("columns", "ranks"), [(512, 1), (768, 2), (1024, 4), (1408, 2), (1030, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_channels_of_all_ranks_are_the_weight(
    name: str, columns: int, ranks: int, permuted: bool, kernels: bool
) -> None:
    weight = random_weight(name, ROWS, columns)
    split = split_rows("down", weight.scheme, ROWS, columns, ranks, permuted=permuted, kernels=kernels)
    whole = torch.zeros(ROWS, columns)
    seen = torch.zeros(columns, dtype=torch.int64)
    for part in split.parts:
        channels = part.channels(weight.scheme, columns)
        whole[:, channels] = weight_of_part(weight, part).dequantize()
        seen[channels] += 1
        assert not kernels or part.body[0] % 128 == 0
    assert torch.equal(seen, torch.ones_like(seen))
    assert torch.equal(whole, weight.dequantize())
    sizes = [part.in_features(weight.scheme) for part in split.parts]
    assert max(sizes) - min(sizes) <= 2 * 256


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_that_do_not_gather_get_the_codes_of_one(name: str, ranks: int) -> None:
    scheme, columns = SCHEMES[name], 1024
    split = split_rows("o", scheme, ROWS, columns, ranks, permuted=False, kernels=False)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))

    def quantized(rows: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        layout = InputLayout(
            rows.shape[1], scheme.outliers, scheme.hadamard_block, hadamard=scheme.transform == "hadamard"
        )
        rows = layout.apply(rows)
        return rows if scheme.activations.element == "float" else quantize_activations(rows, scheme).dequantize()

    expected = quantized(x, scheme)
    token_scaled = scheme.activations.element != "float" and scheme.activations.scale not in ("fp16", "e8m0")
    assert split.gathered == token_scaled
    if not split.gathered:
        width = columns // ranks
        own = [quantized(x[:, r * width : (r + 1) * width], part.scheme(scheme)) for r, part in enumerate(split.parts)]
        assert torch.equal(torch.cat(own, dim=1), expected)


def test_a_permutation_across_ranks_is_gathered() -> None:
    scheme = SCHEMES["atom-paper"]
    assert split_rows("o", scheme, ROWS, 1024, 2, permuted=True, kernels=False).gathered
    assert not split_rows("o", scheme, ROWS, 1024, 2, permuted=False, kernels=False).gathered


def test_groups_that_a_border_would_cut_are_gathered() -> None:
    assert split_rows("down", SCHEMES["atom-paper"], ROWS, 1152, 2, permuted=False, kernels=False).gathered
    assert split_rows("down", SCHEMES["fp4"], ROWS, 1024, 4, permuted=False, kernels=False).gathered is False


def test_outliers_weigh_in_the_balance() -> None:
    scheme = SCHEMES["w4a8"]  # Llama-2-7B's down_proj: 85 groups of body and one of outliers
    split = split_rows("down", scheme, 4096, 11008, 2, permuted=False, kernels=True)
    assert [part.in_features(scheme) for part in split.parts] == [5504, 5504]


def test_too_many_ranks_are_refused_with_the_sizes() -> None:
    scheme = Scheme(WeightFormat("int4", 128, "two_level"), ActivationFormat("int8"), 128, "hadamard")
    with pytest.raises(
        UnsupportedError, match=r"down_proj has 256 body channels in pieces of 128 and 128 outliers.* 4"
    ):
        split_rows("down_proj", scheme, ROWS, 384, 4, permuted=False, kernels=True)


@pytest.mark.parametrize("container", ["s8", "nibble", "e4m3"])
def test_an_operand_is_cut_where_its_part_begins(container: str) -> None:
    """Body of 3 k-blocks and one of outliers; each value of an operand says which k-block it belongs to."""
    scheme, columns, tokens = SCHEMES["atom-paper"], 512, 8
    layout = KernelLayout(columns, scheme.body(columns), False, None)
    numbers = torch.arange(4, dtype=torch.uint8)
    blocks = numbers[:, None, None].expand(4, tokens, 128)
    per_token = torch.ones(tokens)
    if container == "s8":
        operand = Operand(blocks, blocks[:0], per_token, per_token, numbers[:3, None].half().expand(3, tokens))
    else:
        scales = numbers[:3, None, None].float().expand(3, tokens, 1)
        codes = blocks[:3, :, :64] if container == "nibble" else blocks
        operand = Operand(codes, blocks[3:] if container == "nibble" else blocks[:0], per_token, per_token, scales)
    first = slice_operand(operand, layout, Part((0, ROWS), (0, 256), False))
    last = slice_operand(operand, layout, Part((0, ROWS), (256, 384), True))
    assert first.codes[:, 0, 0].tolist() == [0, 1]
    assert first.group_scales.flatten(1)[:, 0].tolist() == [0, 1]
    assert len(first.outlier_codes) == 0
    assert last.codes[:, 0, 0].tolist() == ([2] if container == "nibble" else [2, 3])
    assert last.group_scales.flatten(1)[:, 0].tolist() == [2]
    assert last.outlier_codes[:, 0, 0].tolist() == ([3] if container == "nibble" else [])


def test_an_operand_of_16_bits_has_two_planes_of_a_block() -> None:
    layout = KernelLayout(512, 512, False, None)
    planes, per_token = torch.arange(8, dtype=torch.uint8)[:, None, None].expand(8, 8, 128), torch.ones(8)
    operand = Operand(planes, planes[:0], per_token, per_token, torch.empty(4, 8, 0))
    part = slice_operand(operand, layout, Part((0, ROWS), (128, 384), False))
    assert part.codes[:, 0, 0].tolist() == [2, 3, 4, 5]
