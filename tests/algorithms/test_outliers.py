"""The order of the channels and what can be folded."""

import torch

from atomcli.algorithms.outliers import energy_permutation, fold_into_heads, input_layout
from atomcli.formats.scheme import SCHEMES, ActivationFormat, Scheme, WeightFormat


def test_channels_ascend_and_outliers_stand_last():
    energy = torch.tensor([3.0, 1.0, 9.0, 1.0, 5.0])
    assert energy_permutation(energy).tolist() == [1, 3, 0, 4, 2]
    scheme = Scheme(WeightFormat("int4", 16, "fp16"), ActivationFormat("float"), 2)
    layout = input_layout(energy, scheme)
    assert layout.outliers == 2
    assert layout.permutation[-2:].tolist() == [4, 2]


def test_a_row_scaled_scheme_needs_no_order():
    assert input_layout(torch.rand(64), SCHEMES["w8a8"]).permutation is None


def test_folding_into_v_gives_the_same_output():
    heads, kv_heads, head_dim, hidden = 4, 2, 8, 16
    generator = torch.Generator().manual_seed(0)
    inside = torch.stack([torch.randperm(head_dim, generator=generator) for _ in range(kv_heads)])
    order = inside.repeat_interleave(heads // kv_heads, 0) + torch.arange(heads)[:, None] * head_dim
    permutation = order.flatten()
    rows = fold_into_heads(permutation, heads, kv_heads)
    value = torch.randn(kv_heads * head_dim, hidden, generator=generator)

    def attention_output(value: torch.Tensor) -> torch.Tensor:  # every query head reads its key-value head
        return value.view(kv_heads, 1, head_dim, hidden).expand(-1, heads // kv_heads, -1, -1).reshape(-1, hidden)

    assert torch.equal(attention_output(value[rows]), attention_output(value)[permutation])


def test_a_permutation_across_heads_can_not_be_folded():
    permutation = torch.arange(32).flip(0)
    assert fold_into_heads(permutation, 4, 4) is None
    assert fold_into_heads(permutation, 1, 1) is not None
    unequal = torch.cat([torch.arange(8), torch.arange(8).flip(0) + 8])
    assert fold_into_heads(unequal, 2, 1) is None
    assert fold_into_heads(unequal, 2, 2) is not None
