"""What the GEMMs refuse, each in a sentence of its own. Needs no GPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atomcli.errors import UsageError
from atomcli.formats.scheme import SCHEMES
from atomcli.kernels import gemm, gemm_launch, group_gemm
from atomcli.kernels.group_layouts import PackedGroups
from atomcli.kernels.layouts import INT4_BLOCK_BYTES, GemmWeight
from atomcli.kernels.quantize import Operand
from atomcli.kernels.tiles import Tile

ROWS, BLOCKS, TOKENS = 256, 4, 8


def operand(**changes: Tensor) -> Operand:
    """Of eight tokens of four blocks."""
    codes = torch.zeros(BLOCKS, TOKENS, 128, dtype=torch.uint8)
    scale = torch.ones(TOKENS)
    return Operand(codes, codes[:0], scale, scale, torch.ones(BLOCKS, TOKENS, 1))._replace(**changes)


WEIGHT = GemmWeight(
    "w4", (ROWS, BLOCKS * 128), torch.zeros(ROWS // 64, BLOCKS, INT4_BLOCK_BYTES, dtype=torch.uint8), torch.ones(ROWS)
)
GROUPS = PackedGroups(torch.zeros(ROWS // 64, BLOCKS, 4224, dtype=torch.uint8), None, None, None, ROWS, "e4m3")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"operand": operand(codes=torch.zeros(BLOCKS + 1, TOKENS, 128, dtype=torch.uint8))}, "the weight needs 8-bit"),
        ({"operand": operand(codes=torch.zeros(BLOCKS, TOKENS, 128))}, "the weight needs 8-bit"),
        ({"tokens": 9}, "9 tokens need a multiple of 8"),
        ({"operand": operand(codes=torch.zeros(BLOCKS, 9, 128, dtype=torch.uint8))}, "The operand has 9 token rows"),
        ({"operand": operand(token_scale=torch.ones(7))}, "token_scale must be fp32 of 8 values"),
        ({"operand": operand(token_scale=torch.ones(8).half())}, "token_scale must be fp32 of 8 values"),
        ({"dtype": torch.float32}, "bfloat16 or float16, not torch.float32"),
        ({"bias": torch.zeros(ROWS).bfloat16()}, "The bias must be fp32"),
        ({"bias": torch.zeros(ROWS + 1)}, "The bias must be fp32"),
        ({"bias": torch.zeros(2 * ROWS)[::2]}, "The bias of the GEMM must be contiguous"),
        (
            {"operand": operand(codes=torch.zeros(TOKENS, BLOCKS, 128, dtype=torch.uint8).transpose(0, 1))},
            "The operand of the GEMM must be contiguous",
        ),
        ({"weight": replace(WEIGHT, body=WEIGHT.body[..., ::2])}, "The weight of the GEMM must be contiguous"),
    ],
)
def test_misfits_of_the_integer_gemm(changes: dict, sentence: str) -> None:
    arguments = {"operand": operand(), "weight": WEIGHT, "tokens": TOKENS, "dtype": torch.bfloat16, "bias": None}
    with pytest.raises(UsageError, match=sentence):
        gemm.linear(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"operand": operand(codes=torch.zeros(3, TOKENS, 128, dtype=torch.uint8))}, "e4m3 codes need"),
        ({"tokens": 9}, "e4m3 codes need"),
        ({"dtype": torch.float64}, "bfloat16 or float16, not torch.float64"),
        ({"bias": torch.zeros(ROWS).half()}, "The bias must be fp32"),
        ({"weight": GROUPS._replace(blocks=GROUPS.blocks[..., ::2])}, "The weight of the GEMM must be contiguous"),
    ],
)
def test_misfits_of_the_gemm_with_group_scales(changes: dict, sentence: str) -> None:
    scheme = SCHEMES["fp4"]
    arguments = {"operand": operand(), "weight": GROUPS, "scheme": scheme, "tokens": TOKENS, "dtype": torch.bfloat16}
    with pytest.raises(UsageError, match=sentence):
        group_gemm.linear(**(arguments | changes))


def off_by_eight(tensor: Tensor) -> Tensor:
    """The same numbers from an address that 16 does not divide."""
    room = torch.empty(tensor.numel() * tensor.element_size() + 8, dtype=torch.uint8)
    return room[8:].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("name", ["codes", "token_scale"])
def test_addresses_that_bulk_copies_can_not_read(name: str) -> None:
    shifted = operand(**{name: off_by_eight(getattr(operand(), name))})
    output = torch.empty(TOKENS, ROWS, dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="must begin at a multiple of 16 bytes"):
        gemm_launch.launch(None, Tile(8), shifted, WEIGHT.body, WEIGHT.row_scale, output, None, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="The weight of the GEMM must begin"):
        gemm_launch.check_alignment(operand(), off_by_eight(WEIGHT.body))
